//! The example's page in a real browser: Chromium without a window, told what to do over the
//! WebDriver protocol.

use std::process::Command;
use std::time::{Duration, Instant};

use http::{Method, Request};
use serde_json::{Value, json};

use crate::http_support::*;
use crate::support::*;

/// How soon a note must be on the pages of the other instances.
const SOON: Duration = Duration::from_secs(1);

/// A browser with one window to begin with. Each command is a request to chromedriver.
struct Browser {
    http: Http,
    session: String,
    _driver: Process,
    _profile: tempfile::TempDir,
}

impl Browser {
    async fn start() -> Browser {
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new(installed("chromedriver"));
        // Nothing is left in the user's own directory.
        command.arg("--port=0").env("HOME", profile.path());
        // The browser that it starts would outlive it.
        let driver = Process::group(&mut command);
        let ready = tokio::task::block_in_place(|| driver.line("started successfully on port "));
        let port = ready.rsplit(' ').next().unwrap().trim_end_matches('.');
        let (http, url) = (Http::new(), format!("http://127.0.0.1:{port}"));
        let options = json!({
            "binary": installed("chromium"),
            "args": [
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", "--disable-breakpad",
                format!("--user-data-dir={}", profile.path().join("profile").display()),
            ],
        });
        let capabilities =
            json!({ "alwaysMatch": { "browserName": "chrome", "goog:chromeOptions": options } });
        let begin = format!("{url}/session");
        let made = tell(&http, Method::POST, &begin, json!({ "capabilities": capabilities })).await;
        let session = format!("{url}/session/{}", made["sessionId"].as_str().unwrap());
        Browser { http, session, _driver: driver, _profile: profile }
    }

    async fn post(&self, what: &str, body: Value) -> Value {
        tell(&self.http, Method::POST, &format!("{}/{what}", self.session), body).await
    }

    /// A page in a window of its own.
    async fn open(&self, url: &str) -> Page<'_> {
        let window = self.post("window/new", json!({ "type": "window" })).await["handle"].clone();
        let page = Page { browser: self, window };
        page.show().await;
        self.post("url", json!({ "url": url })).await;
        page
    }

    async fn quit(self) {
        tell(&self.http, Method::DELETE, &self.session, Value::Null).await;
    }
}

/// Sends a command and returns its value.
async fn tell(http: &Http, method: Method, url: &str, body: Value) -> Value {
    let body = if method == Method::DELETE { String::new() } else { body.to_string() };
    let request = Request::builder().method(method).uri(url).header("content-type", "application/json");
    let answer = within("the browser", http.send(request.body(body).unwrap())).await.unwrap();
    assert_eq!(answer.status, 200, "{url}: {}", answer.text());
    serde_json::from_slice::<Value>(&answer.body).unwrap()["value"].take()
}

struct Page<'a> {
    browser: &'a Browser,
    window: Value,
}

impl Page<'_> {
    /// Brings its window to the front: later commands are for it.
    async fn show(&self) {
        self.browser.post("window", json!({ "handle": self.window })).await;
    }

    async fn element(&self, selector: &str) -> String {
        self.show().await;
        let found = self.browser.post("element", json!({ "using": "css selector", "value": selector })).await;
        found.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_string()
    }

    async fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector).await;
        self.browser.post(&format!("element/{element}/value"), json!({ "text": text })).await;
    }

    async fn click(&self, selector: &str) {
        let element = self.element(selector).await;
        self.browser.post(&format!("element/{element}/click"), json!({})).await;
    }

    async fn run(&self, script: &str) -> Value {
        self.show().await;
        self.browser.post("execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// The texts of the notes that it shows, the newest first.
    async fn notes(&self) -> Vec<String> {
        self.texts("#notes p").await
    }

    /// The texts of all that this finds.
    async fn texts(&self, selector: &str) -> Vec<String> {
        let script =
            format!("return Array.from(document.querySelectorAll('{selector}'), e => e.textContent)");
        let texts = self.run(&script).await;
        texts.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_string()).collect()
    }

    /// Waits until the texts of what this finds are so, and returns them.
    async fn until(&self, selector: &str, so: impl Fn(&[String]) -> bool) -> Vec<String> {
        let mut texts = Vec::new();
        let shown = tokio::time::timeout(LIMIT, async {
            loop {
                texts = self.texts(selector).await;
                if so(&texts) {
                    return;
                }
            }
        });
        assert!(shown.await.is_ok(), "{selector}: {texts:?}");
        texts
    }

    /// Presses the button until it does not ask for another try, as when no replica has all yet.
    async fn hand_over(&self) -> String {
        let begin = Instant::now();
        loop {
            self.run("document.querySelector('#handoff button').click()").await;
            let ended =
                |said: &[String]| said[0].contains(" is the primary") || said[0].contains("try again");
            let said = self.until("#handoff output", ended).await.remove(0);
            if !said.contains("try again") {
                return said;
            }
            assert!(begin.elapsed() < LIMIT, "{said}");
            self.run("document.querySelector('#handoff output').textContent = ''").await;
        }
    }

    /// Waits until it shows exactly these.
    async fn shows(&self, notes: &[&str]) {
        let mut seen = Vec::new();
        let shown = tokio::time::timeout(LIMIT, async {
            while seen != notes {
                seen = self.notes().await;
            }
        });
        assert!(shown.await.is_ok(), "{seen:?}, not {notes:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs chromium and chromedriver"]
async fn a_note_typed_on_a_replicas_page_is_there_at_once_and_on_all_pages_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let (Example { process: example, urls }, _) = tokio::task::block_in_place(|| Example::fixed(dir.path()));
    let browser = Browser::start().await;
    let (a, b) = (browser.open(&urls[0]).await, browser.open(&urls[1]).await);
    let mine = browser.open(&urls[2]).await;
    assert!(mine.run("return document.body.textContent").await.as_str().unwrap().contains("replica"));
    // Each page notes itself when it first shows what is to come: the windows can't be asked at the
    // same time.
    let watch = "new MutationObserver(() => { window.seen ??= Date.now() })
        .observe(document.getElementById('notes'), { childList: true })";
    for page in [&a, &b, &mine] {
        page.shows(&[]).await;
        page.run(watch).await;
    }
    let text = "typed <b>here</b> & \"quoted\" {{query}}";
    mine.type_into("#add input", text).await;
    mine.run("document.querySelector('#add').addEventListener('submit', () => { window.sent = Date.now() })")
        .await;
    mine.click("#add button").await;
    mine.shows(&[text]).await;
    let sent = mine.run("return window.sent").await.as_u64().unwrap();
    let field = "return document.querySelector('#add input').value";
    within("an empty field", async { while mine.run(field).await != "" {} }).await;
    for (name, page) in [("the replica's own", &mine), ("the primary's", &a), ("the other replica's", &b)] {
        page.shows(&[text]).await;
        let took = page.run("return window.seen").await.as_u64().unwrap().saturating_sub(sent);
        println!("{name} page showed the note after {took} ms");
        assert!(Duration::from_millis(took) < SOON, "{name} page: {took} ms");
    }
    // What the shell writes into the primary's file is shown as well, and what is deleted goes
    // away.
    plain(&dir.path().join(urls[0].rsplit(':').next().unwrap()).join("notes.db"))
        .execute("INSERT INTO notes(text) VALUES ('from outside')", [])
        .unwrap();
    for page in [&a, &b, &mine] {
        page.shows(&["from outside", text]).await;
    }
    mine.click("#notes li:last-child .gone").await;
    for page in [&mine, &a, &b] {
        page.shows(&["from outside"]).await;
    }
    // A search stays one while notes come and go.
    mine.type_into("[name=q]", "outs").await;
    let begin = Instant::now();
    mine.click("form[method=get] button").await;
    mine.shows(&["from outside"]).await;
    a.type_into("#add input", "not asked for").await;
    a.click("#add button").await;
    a.shows(&["not asked for", "from outside"]).await;
    a.type_into("#add input", "outside, too").await;
    a.click("#add button").await;
    mine.shows(&["outside, too", "from outside"]).await;
    println!("searched for {:?}", begin.elapsed());
    browser.quit().await;
    tokio::task::block_in_place(|| example.end());
}

/// The primaries that a page shows, one after the other, as it notes them itself.
const NOTE_PRIMARIES: &str = "window.primaries = [];
    const note = () => {
        const now = document.querySelector('.node.primary a')?.textContent;
        if (now && now !== window.primaries.at(-1)) window.primaries.push(now);
    };
    note();
    new MutationObserver(note).observe(document.getElementById('nodes'), { childList: true })";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs chromium and chromedriver"]
async fn the_pages_show_how_another_instance_takes_over_from_a_primary_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (Example { process: example, .. }, table) =
        tokio::task::block_in_place(|| Example::three(dir.path()));
    let (leading, others): (Vec<Row>, Vec<Row>) = table.into_iter().partition(|row| row.role == "primary");
    let killed = &leading[0];
    let browser = Browser::start().await;
    let pages = [browser.open(&others[0].url).await, browser.open(&others[1].url).await];
    for page in &pages {
        page.until("#role", |role| role == ["replica"]).await;
        page.until(".node.primary a", |urls| urls == [&*killed.url]).await;
        page.run(NOTE_PRIMARIES).await;
    }
    pages[0].type_into("#add input", "in spite of it").await;
    tokio::task::block_in_place(|| kill(killed.pid));
    let begin = Instant::now();
    // Not by its place: the boxes above may grow in this moment.
    pages[0].run("document.querySelector('#add button').click()").await;
    for page in &pages {
        page.shows(&["in spite of it"]).await;
    }
    println!("both pages showed the note {:?} after the kill", begin.elapsed());
    let is_other = |urls: &[String]| urls.len() == 1 && urls[0] != killed.url;
    let now = pages[0].until(".node.primary a", is_other).await.remove(0);
    for (page, row) in pages.iter().zip(&others) {
        page.until(".node.primary a", |urls| urls == [&*now]).await;
        assert_eq!(page.run("return window.primaries").await, json!([killed.url, now]));
        let (role, last) = match row.url == now {
            true => ("primary", "primary, ".to_string()),
            false => ("replica", format!("replica of {now}, ")),
        };
        page.until("#role", |shown| shown == [role]).await;
        // The newest first: a time, and what it is from then on.
        let changes = page.until(".node.me li", |lines| lines[0].contains(&last)).await;
        if role == "primary" {
            let words: Vec<_> = changes.iter().map(|line| line.split([' ', ',']).nth(1).unwrap()).collect();
            assert_eq!(words[..3], ["primary", "promoting", "electing"], "{changes:?}");
        }
    }
    // What was killed is started again, and follows.
    for page in &pages {
        page.until(".node.replica a", |urls| urls.contains(&killed.url)).await;
        assert_eq!(page.run("return window.primaries").await, json!([killed.url, now]));
    }
    browser.quit().await;
    tokio::task::block_in_place(|| example.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs chromium and chromedriver"]
async fn a_button_on_any_page_hands_the_lease_over() {
    let dir = tempfile::tempdir().unwrap();
    let (Example { process: example, urls }, table) =
        tokio::task::block_in_place(|| Example::three(dir.path()));
    let browser = Browser::start().await;
    let mut led = table.iter().find(|row| row.role == "primary").unwrap().url.clone();
    // From the page of a replica, of which one is the next primary, and then from that one's own.
    let replica = urls.iter().find(|url| **url != led).unwrap();
    let page = browser.open(replica).await;
    page.type_into("#add input", "before").await;
    page.click("#add button").await;
    page.shows(&["before"]).await;
    for _ in 0..3 {
        page.until(".node.primary a", |shown| shown == [&*led]).await;
        let said = page.hand_over().await;
        println!("{said}");
        let next = said.split(' ').next().unwrap().to_string();
        assert!(next != led && urls.contains(&next), "{said}");
        page.until(".node.primary a", |shown| shown == [&*next]).await;
        page.run("document.querySelector('#handoff output').textContent = ''").await;
        led = next;
    }
    page.type_into("#add input", "after").await;
    page.click("#add button").await;
    page.shows(&["after", "before"]).await;
    browser.quit().await;
    tokio::task::block_in_place(|| example.end());
}
