//! Owns running child processes: streamed output, deadlines, and no process left behind.
//!
//! Invariants: a child dies with this program, even if it is killed; past its deadline it is killed together
//! with everything it started. Children share our process group, so Ctrl-C reaches them too.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::{self, Read as _, Write as _},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How often a running child is looked at; bounds how late an exit or a deadline is noticed.
const POLL: Duration = Duration::from_millis(20);
/// How long output may trail an exit: a leaked grandchild can hold the pipe open for ever.
const TRAILING_OUTPUT: Duration = Duration::from_secs(2);

/// How a streamed child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Exited(ExitStatus),
    /// Killed at the deadline.
    TimedOut,
}

impl Ended {
    pub(crate) fn success(self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }
}

/// A command whose process dies when the thread that starts it does. Start it from a thread that lives on.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

/// Runs to the end with inherited output; a non-zero status is an error that names the command.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = shown(command);
    let status = command.status().with_context(|| format!("start {shown}"))?;
    ensure!(status.success(), "`{shown}` failed with {status}");
    Ok(())
}

/// Runs to the end and returns stdout; errors carry stderr.
pub(crate) fn capture(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let shown = shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {shown}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{shown}` failed with {}: {}", output.status, complaint.trim());
    Ok(output.stdout)
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    match command.get_program().to_str() {
        // The wrapper of `command` is not worth a reader's time.
        Some("setpriv") => words.get(3..).unwrap_or_default().join(" "),
        _ => format!("{} {}", command.get_program().to_string_lossy(), words.join(" ")),
    }
}

/// Runs until the child ends or the deadline passes. Both output streams go to our stdout as they come, and
/// to `line` once complete.
pub(crate) fn stream(
    command: &mut Command,
    deadline: Instant,
    mut line: impl FnMut(&str),
) -> anyhow::Result<Ended> {
    let shown = shown(command);
    let (mut reader, writer) = io::pipe().context("make a pipe")?;
    let stderr = writer.try_clone().context("duplicate a pipe")?;
    let mut child =
        command.stdout(writer).stderr(stderr).spawn().with_context(|| format!("start {shown}"))?;
    // Our own ends of the pipe live in `command`; only the child's may keep it open.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let (chunk_tx, chunk_rx) = mpsc::sync_channel::<Vec<u8>>(64);
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(read @ 1..) = reader.read(&mut buffer) {
            let chunk = buffer.get(..read).unwrap_or_default().to_vec();
            if chunk_tx.send(chunk).is_err() {
                break;
            }
        }
    });

    let mut lines = Lines::default();
    let mut ended = None;
    let mut stop_reading = deadline + TRAILING_OUTPUT;
    loop {
        let open = match chunk_rx.recv_timeout(POLL) {
            Ok(chunk) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&chunk).and_then(|()| stdout.flush()).context("write to stdout")?;
                lines.push(&chunk, &mut line);
                true
            }
            Err(mpsc::RecvTimeoutError::Timeout) => true,
            Err(mpsc::RecvTimeoutError::Disconnected) => false,
        };
        if ended.is_none() {
            ended = poll(&mut child, deadline, open)?;
            if ended.is_some() {
                stop_reading = Instant::now() + TRAILING_OUTPUT;
            }
        }
        if let Some(ended) = ended
            && (!open || Instant::now() > stop_reading)
        {
            lines.finish(&mut line);
            return Ok(ended);
        }
    }
}

/// One look at the child; kills it past the deadline. Waits a moment itself if its output is already closed.
fn poll(child: &mut Child, deadline: Instant, output_open: bool) -> anyhow::Result<Option<Ended>> {
    if let Some(status) = child.try_wait().context("wait for a child")? {
        return Ok(Some(Ended::Exited(status)));
    }
    if Instant::now() >= deadline {
        kill_tree(child);
        return Ok(Some(Ended::TimedOut));
    }
    if !output_open {
        thread::sleep(POLL);
    }
    Ok(None)
}

/// Kills a child and all that descends from it, and reaps the child.
pub(crate) fn kill_tree(child: &mut Child) {
    let victims = descendants(child.id(), &parents());
    for pid in std::iter::once(child.id()).chain(victims) {
        // One that is gone already is what we want.
        let _gone = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
    }
    let _reaped = child.wait();
}

/// Parent of every process that can be seen now.
fn parents() -> BTreeMap<u32, u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, parent_of(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect()
}

/// The fourth field of `/proc/PID/stat`; the second, a name in brackets, may hold anything.
fn parent_of(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn descendants(root: u32, parents: &BTreeMap<u32, u32>) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|&(_, &of)| of == parent).map(|(&pid, _)| pid));
        next += 1;
    }
    found.split_off(1)
}

/// Cuts a byte stream into lines without their ends.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, chunk: &[u8], line: &mut impl FnMut(&str)) {
        self.rest.extend_from_slice(chunk);
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let whole: Vec<u8> = self.rest.drain(..=end).collect();
            line(String::from_utf8_lossy(&whole).trim_end());
        }
    }

    fn finish(&mut self, line: &mut impl FnMut(&str)) {
        if !self.rest.is_empty() {
            line(String::from_utf8_lossy(&std::mem::take(&mut self.rest)).trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> (Ended, Vec<String>) {
        let mut seen = Vec::new();
        let deadline = Instant::now() + limit;
        let ended =
            stream(command("sh").args(["-c", script]), deadline, |line| seen.push(line.to_owned())).unwrap();
        (ended, seen)
    }

    #[test]
    fn output_arrives_by_line_and_the_status_is_kept() {
        let (ended, seen) = shell("echo one; echo two >&2; printf three; exit 3", Duration::from_secs(10));
        assert_eq!(seen, ["one", "two", "three"]);
        assert!(matches!(ended, Ended::Exited(status) if status.code() == Some(3)));
    }

    #[test]
    fn past_the_deadline_a_child_dies_with_what_it_started() {
        let begun = Instant::now();
        let (ended, seen) = shell("sh -c 'echo $$; exec sleep 60' & wait", Duration::from_secs(2));
        assert_eq!(ended, Ended::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(20));
        let grandchild: u32 = seen.first().unwrap().parse().unwrap();
        // The signal is on its way when we are told; a busy machine takes its time to deliver it.
        let patience = Instant::now() + Duration::from_secs(10);
        loop {
            let state = fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                break;
            }
            assert!(Instant::now() < patience, "still there: {state}");
            thread::sleep(POLL);
        }
    }

    #[test]
    fn output_held_open_by_a_leaked_grandchild_does_not_hold_us() {
        let begun = Instant::now();
        let (ended, _) = shell("sleep 8 & exit 0", Duration::from_secs(30));
        assert!(ended.success());
        assert!(begun.elapsed() < Duration::from_secs(7));
    }

    #[test]
    fn a_process_name_with_brackets_does_not_hide_its_parent() {
        assert_eq!(parent_of("42 (a) b (c) S 7 42 42 0"), Some(7));
    }

    #[test]
    fn descendants_reach_every_generation() {
        let parents = BTreeMap::from([(2, 1), (3, 2), (4, 3), (5, 1), (9, 8)]);
        assert_eq!(descendants(2, &parents), [3, 4]);
    }
}
