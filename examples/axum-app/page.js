const lags = {}, here = document.documentElement.dataset.url;
const send = (method, path, body) => fetch(path, {
  method, body: body && JSON.stringify(body), headers: {'content-type': 'application/json'},
}).then(async r => { if (!r.ok) alert((await r.json().catch(() => ({error: r.status}))).error); return r.ok; });
document.getElementById('add').onsubmit = async e => {
  e.preventDefault();
  if (await send('POST', '/api/notes', {text: e.target.text.value})) { e.target.reset(); refresh(); }
};
document.getElementById('handoff').onsubmit = async e => {
  e.preventDefault();
  const said = e.target.querySelector('output'), begun = performance.now();
  said.textContent = 'handing over';
  const answer = await fetch('/api/handoff', {method: 'POST'});
  const {primary, error} = await answer.json().catch(() => ({error: answer.status}));
  said.textContent = primary ? `${primary} is the primary, after ${Math.round(performance.now() - begun)} ms` : error;
};
document.getElementById('notes').onclick = async e => {
  const note = e.target.closest('li');
  if (e.target.className === 'gone' && await send('DELETE', '/api/notes/' + note.dataset.id)) refresh();
};
// The notes of this very page, as it would be now.
let asked = 0, shown = 0;
async function refresh() {
  const mine = ++asked;
  try {
    const now = new DOMParser().parseFromString(await (await fetch(location.href)).text(), 'text/html');
    // Answers may overtake each other.
    if (mine > shown) { shown = mine; document.getElementById('notes').replaceChildren(...now.getElementById('notes').children); }
  } catch { /* this instance is away; the feed tells when it is back */ }
}
const feed = new EventSource('/api/events');
// Whoever wrote, wherever: this instance has it now.
feed.addEventListener('position', refresh);
feed.addEventListener('role', e => { document.getElementById('role').textContent = JSON.parse(e.data); look(); });
const make = (tag, text, parent) => { const n = parent.appendChild(document.createElement(tag)); n.textContent = text; return n; };
function plot(values, parent) {
  const ns = 'http://www.w3.org/2000/svg', svg = document.createElementNS(ns, 'svg');
  const top = Math.max(20, ...values), line = document.createElementNS(ns, 'polyline');
  svg.setAttribute('viewBox', '0 0 60 28'); svg.setAttribute('preserveAspectRatio', 'none');
  line.setAttribute('points', values.map((v, i) => `${i},${27 - 25 * v / top}`).join(' '));
  line.setAttribute('fill', 'none'); line.setAttribute('stroke', 'currentColor'); line.setAttribute('vector-effect', 'non-scaling-stroke');
  svg.append(line); parent.append(svg);
}
// What the instance was, the newest first: "12:03:04 replica of http://127.0.0.1:8081, epoch 3".
function history(changes, parent) {
  const list = make('ol', '', parent);
  for (const c of changes.toReversed()) {
    const of = c.role === 'replica' ? (c.primary ? ` of ${c.primary}` : ' without a primary') : '';
    const why = c.waits_for ? `: ${c.waits_for}` : '';
    make('li', `${new Date(c.at_ms).toLocaleTimeString('en-GB')} ${c.role}${of}, epoch ${c.epoch}${why}`, list);
  }
}
let looked = 0, drawn = 0, again;
async function look() {
  const mine = ++looked;
  let pause = 1000;
  try {
    const nodes = await (await fetch('/api/nodes')).json();
    // An election is over soon.
    if (!nodes.some(n => n.role === 'primary')) pause = 200;
    if (mine > drawn) { drawn = mine; draw(nodes); }
  } catch { /* this instance is away; the next look tells */ }
  clearTimeout(again);
  again = setTimeout(look, pause);
}
function draw(nodes) {
  const home = document.getElementById('nodes'), tops = {};
  for (const box of home.children) tops[box.id] = box.querySelector('ol').scrollTop;
  home.replaceChildren();
  for (const n of nodes) {
    const box = make('div', '', home), lag = lags[n.url] ??= [], away = n.role === 'away';
    if (n.lag_ms != null) lag.push(n.lag_ms); if (lag.length > 60) lag.shift();
    box.className = `node ${n.role} ${n.url === here ? 'me' : ''}`;
    make('b', away ? n.role : `${n.role}, epoch ${n.epoch}`, box);
    const link = make('a', n.url, box); link.href = n.url;
    const wrong = [...(n.waits_for ? [`waits: ${n.waits_for}`] : []), ...(n.problems ?? [])];
    make('div', wrong.join('; '), box).className = 'waits';
    const late = n.lag_ms === null ? 'lag unknown' : n.lag_known ? `lag ${n.lag_ms} ms` : `lag unknown, up to ${n.lag_ms} ms`;
    make('div', away ? 'does not answer' : `transaction ${n.txid ?? '-'}, ${late}`, box);
    make('code', (n.checksum ?? '-').slice(0, 16), box);
    plot(lag, box);
    box.id = n.url;
    history(n.changes ?? [], box);
    box.querySelector('ol').scrollTop = tops[n.url] ?? 0;
  }
}
look();
