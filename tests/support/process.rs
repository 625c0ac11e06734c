//! Other processes of a test: this test binary run again, or another program. Each wait has a
//! limit. What a process says last is shown when the test fails. Dropping it kills it, also after a
//! panic.

use std::any::type_name;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::LIMIT;

/// Lines of a process that a test which fails shows.
const LAST_LINES: usize = 100;
/// Longest wait for a process that runs a whole test.
const TEST_LIMIT: Duration = Duration::from_secs(600);

pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    last: Arc<Mutex<VecDeque<String>>>,
    /// What it starts itself is killed with it.
    group: bool,
}

impl Process {
    /// Runs the test function `entry` of this binary with these variables. It speaks in lines that
    /// begin with `@`.
    pub(crate) fn start(entry: impl Fn(), variables: &[(&str, &str)]) -> Process {
        Process::start_by(Command::new(this_binary()), entry, variables)
    }

    /// The same with files that can't grow beyond so many bytes.
    pub(crate) fn start_limited(entry: impl Fn(), variables: &[(&str, &str)], bytes: u64) -> Process {
        // The unit of `ulimit -f` is 512 bytes. Without the trap the first write beyond it would
        // kill.
        let limit = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", bytes / 512);
        Process::start_by(shell(&limit), entry, variables)
    }

    /// The same by a command that lacks only the arguments of this binary; see [`shell`].
    pub(crate) fn start_by(mut command: Command, entry: impl Fn(), variables: &[(&str, &str)]) -> Process {
        command.args([test_name(&entry), "--exact", "--nocapture", "--include-ignored"]);
        command.env(CHILD, "1").envs(variables.iter().copied()).stdin(Stdio::piped());
        Process::spawn(&mut command, false, |line| {
            // The harness's own words may stand before ours on a line.
            line.split_once('@').map(|(_, said)| said.to_string())
        })
    }

    /// Runs another program, which speaks in lines on both its outputs.
    pub(crate) fn program(command: &mut Command) -> Process {
        Process::spawn(command.stdin(Stdio::null()), false, |line| Some(line.to_string()))
    }

    /// The same of a program that starts others, which would outlive it.
    pub(crate) fn group(command: &mut Command) -> Process {
        let command = command.stdin(Stdio::null()).process_group(0);
        Process::spawn(command, true, |line| Some(line.to_string()))
    }

    fn spawn(command: &mut Command, group: bool, said: fn(&str) -> Option<String>) -> Process {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let (sender, lines) = channel();
        let last = Arc::<Mutex<VecDeque<String>>>::default();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let (sender, last) = (sender.clone(), last.clone());
            std::thread::spawn(move || listen(output, &sender, &last, said));
        }
        Process { stdin: child.stdin.take(), child, lines, last, group }
    }

    /// The next line whose first word is this; others are dropped.
    pub(crate) fn expect(&self, word: &str) -> String {
        self.next_that(word, |line| line.split(' ').next() == Some(word))
    }

    /// The next line with this in it; others are dropped.
    pub(crate) fn line(&self, part: &str) -> String {
        self.next_that(part, |line| line.contains(part))
    }

    fn next_that(&self, what: &str, fits: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if fits(&line) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("timed out: {what}"),
                Err(RecvTimeoutError::Disconnected) => panic!("the process ended before it said {what}"),
            }
        }
    }

    /// None: it has ended, or said nothing for too long.
    pub(crate) fn next_line(&self) -> Option<String> {
        self.lines.recv_timeout(LIMIT).ok()
    }

    /// Says a line to a test function that hears.
    pub(crate) fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("a program hears nothing");
        writeln!(stdin, "{line}").unwrap();
    }

    /// Waits until the condition tells that the process is ready. It must not end before.
    pub(crate) fn until(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        let end = Instant::now() + LIMIT;
        while !ready() {
            assert!(Instant::now() < end, "timed out: {what}");
            assert!(self.child.try_wait().unwrap().is_none(), "the process ended before {what}");
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    /// SIGKILL; what it had said before is returned.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.rest()
    }

    /// SIGTERM, and its end, which is a good one. How long that took.
    pub(crate) fn end(mut self) -> Duration {
        let begin = Instant::now();
        self.signal(Signal::TERM);
        let status = self.wait(LIMIT);
        assert!(status.success(), "{status}");
        begin.elapsed()
    }

    /// Waits for its end, which is a good one. What it had said before is returned.
    pub(crate) fn success(mut self) -> Vec<String> {
        let status = self.wait(TEST_LIMIT);
        assert!(status.success(), "{status}");
        self.rest()
    }

    /// Waits for its end by itself.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "timed out: the end of the process");
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    /// What a process that has ended said and the test has not heard.
    fn rest(&self) -> Vec<String> {
        std::iter::from_fn(|| self.next_line()).collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

/// Not even a test that fails leaves a process running. It shows what the process said last.
impl Drop for Process {
    fn drop(&mut self) {
        // They may have ended by themselves.
        if self.group {
            let _ = kill_process_group(self.pid(), Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let last = self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            last.iter().for_each(|line| eprintln!("| {line}"));
        }
    }
}

/// Reads an output to its end, also after the test: no process waits until it is heard.
fn listen(
    output: impl Read,
    lines: &Sender<String>,
    last: &Mutex<VecDeque<String>>,
    said: fn(&str) -> Option<String>,
) {
    let (mut output, mut bytes) = (BufReader::new(output), Vec::new());
    while matches!(output.read_until(b'\n', &mut bytes), Ok(1..)) {
        let line = String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_string();
        bytes.clear();
        if let Some(said) = said(&line) {
            // The test may have ended.
            let _ = lines.send(said);
        }
        let Ok(mut last) = last.lock() else { return };
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
}

/// A shell that runs a script whose `"$@"` is this binary with its arguments.
pub(crate) fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(this_binary());
    command
}

pub(crate) fn this_binary() -> std::path::PathBuf {
    std::env::current_exe().unwrap()
}

/// The name of a test function, as a filter takes it: its path without the crate.
fn test_name<F: Fn()>(_: &F) -> &'static str {
    let (_, name) = type_name::<F>().split_once("::").expect("the function itself, and no pointer to it");
    name
}

/// For a test that counts or sets what a whole process has. It says whether this process runs the
/// test alone. If not, the test has run in a process of its own when this returns.
pub(crate) fn alone(test: impl Fn()) -> bool {
    if is_child() {
        speak("alone");
        return true;
    }
    let said = Process::start(test, &[]).success();
    assert_eq!(said, ["alone"]);
    false
}

/// Set where this binary was started by [`Process::start`].
const CHILD: &str = "REPLITE_TEST_CHILD";

/// Whether this process is a child that [`Process::start`] made; a test function for children
/// returns at once if not.
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

pub(crate) fn speak(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@{line}").unwrap();
    out.flush().unwrap();
}

/// Waits for a line on standard input.
pub(crate) fn hear() -> String {
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(0);
    }
    line.trim().to_string()
}
