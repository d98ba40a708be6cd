//! Owns the CNI plugin: the part of the mesh that runs between a pod's network being made and its first process.
//!
//! The container runtime starts it as the last of the node's chain of plugins. It changes no interface, route or address: it asks
//! the node's agent to enrol the pod, waits for that, and passes on the result of the plugin before it.
//!
//! Invariants:
//! - The result of the plugin before is passed on as it came.
//! - A pod outside the mesh starts whatever becomes of the agent. A pod of the mesh that is not enrolled does not start,
//!   unless the plugin was told to allow it; then standard error, which runtimes put into their log, says so.
//! - DEL and GC never fail for want of an agent: what it did not hear it finds out.
//! - No runtime, no threads: it is started twice in the life of each pod.
//!
//! Not here: what the agent does with a request (`node/cni.rs`), putting the plugin in place (`install.rs`).

mod ask;
pub mod conflist;
mod failure;
mod input;
pub mod install;
pub mod known;
pub mod protocol;

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::{
    ask::{AskError, ask},
    failure::{Code, Failure},
    input::{Call, Input, Settings, Unenrolled},
    known::{KnownPods, LookError},
    protocol::{Answer, PodRef, Request},
};
use crate::report::report;

/// Name of the plugin in the CNI folder and in the configuration.
pub const PLUGIN: &str = "nodemesh-cni";
/// Versions of the specification that are spoken. Results of 0.3.0 have the form of 0.3.1's, and are passed on as they came.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Largest configuration read.
const INPUT_MAX: u64 = 1 << 20;
/// A meshed pod waits this long for an agent that is being replaced.
const AWAY_MAX: Duration = Duration::from_secs(5);
const TRY_EACH: Duration = Duration::from_millis(100);
/// The agent gives up on an enrolment before this.
const ADD_MAX: Duration = Duration::from_secs(20);
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Whether the program was started under the plugin's name.
pub fn is_called(program: Option<&std::ffi::OsStr>) -> bool {
    program.and_then(|path| std::path::Path::new(path).file_name()).is_some_and(|name| name == PLUGIN)
}

/// Runs the plugin as the environment and standard input say. Errors go to standard output, as the specification has it.
pub fn run() -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok();
    let mut text = Vec::new();
    let read = io::stdin().lock().take(INPUT_MAX + 1).read_to_end(&mut text);
    let outcome = match read {
        Err(error) => Err(Failure::new(Code::Io, format!("read the configuration: {error}"))),
        Ok(_) if text.len() as u64 > INPUT_MAX => {
            Err(Failure::new(Code::Decode, format!("the configuration is longer than {INPUT_MAX} bytes")))
        }
        Ok(_) => Input::read(&variable, &text).and_then(|input| act(&input)),
    };
    let (printed, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(), ExitCode::FAILURE),
    };
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{printed}").and_then(|()| stdout.flush()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// What is to be printed, if anything.
fn act(input: &Input) -> Result<Option<Value>, Failure> {
    let settings = &input.settings;
    match &input.call {
        Call::Version => {
            Ok(Some(json!({"cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS})))
        }
        // An agent that is away must not make the whole node unready: pods outside the mesh can start.
        Call::Status => Ok(None),
        Call::Add { attachment, result } => {
            let printed = Some(result.clone());
            let Some(attachment) = attachment else { return Ok(printed) };
            if settings.exempt.contains(&attachment.pod.namespace) {
                return Ok(printed);
            }
            add(settings, &attachment.pod, &Request::Add(attachment.clone()))?;
            Ok(printed)
        }
        Call::Del(container) => {
            forget(settings, &Request::Del(container.clone()));
            Ok(None)
        }
        Call::Check { attachment } => {
            let Some(attachment) = attachment else { return Ok(None) };
            if settings.exempt.contains(&attachment.pod.namespace) {
                return Ok(None);
            }
            match ask(&settings.socket, &Request::Check(attachment.clone()), ANSWER_MAX) {
                Ok(answer) => judge(answer, settings, &attachment.pod).map(|()| None),
                Err(AskError::Away(_)) => Ok(None),
                Err(error) => Err(Failure::new(Code::TryLater, report(&error))),
            }
        }
        Call::Gc(valid) => {
            forget(settings, &Request::Gc { valid: valid.clone() });
            Ok(None)
        }
    }
}

/// Waits until the pod is enrolled, or known not to be meshed.
fn add(settings: &Settings, pod: &PodRef, request: &Request) -> Result<(), Failure> {
    let give_up = Instant::now() + AWAY_MAX;
    loop {
        match ask(&settings.socket, request, ADD_MAX) {
            Ok(answer) => return judge(answer, settings, pod),
            Err(AskError::Away(error)) => {
                if may_start_without(settings, pod) {
                    return Ok(());
                }
                if Instant::now() >= give_up {
                    let socket = settings.socket.display();
                    return unenrolled(
                        settings,
                        Code::TryLater,
                        format!(
                            "pod {pod} is to be meshed, and the node's mesh agent does not answer at {socket}: {error}"
                        ),
                    );
                }
                sleep(TRY_EACH);
            }
            Err(error) => {
                if may_start_without(settings, pod) {
                    return Ok(());
                }
                return unenrolled(
                    settings,
                    Code::TryLater,
                    format!("pod {pod} is to be meshed: {}", report(&error)),
                );
            }
        }
    }
}

/// Whether a pod starts although the agent was not heard: it is outside the mesh, or there is no mesh any more.
fn may_start_without(settings: &Settings, pod: &PodRef) -> bool {
    match KnownPods::read(&settings.known) {
        Ok(known) => !known.is_meshed(pod),
        Err(LookError::Gone) => true,
        // A file that cannot be read says nothing, and the agent says nothing either: as if the pod were meshed.
        Err(LookError::Unreadable { .. }) => false,
    }
}

fn judge(answer: Answer, settings: &Settings, pod: &PodRef) -> Result<(), Failure> {
    match answer {
        Answer::Enrolled | Answer::Unmeshed { .. } | Answer::Done => Ok(()),
        Answer::Refused { reason, again } => {
            let code = if again { Code::TryLater } else { Code::NotEnrolled };
            unenrolled(settings, code, format!("pod {pod} cannot be brought into the mesh: {reason}"))
        }
    }
}

fn unenrolled(settings: &Settings, code: Code, message: String) -> Result<(), Failure> {
    match settings.unenrolled {
        Unenrolled::Allow => {
            // Nobody may be listening, which is no reason to fail.
            drop(writeln!(
                io::stderr(),
                "nodemesh: {message}; it starts outside the mesh (cni.unenrolled=allow)"
            ));
            Ok(())
        }
        Unenrolled::Fail => Err(Failure::new(code, message)),
    }
}

/// Tells the agent of what is gone. One that is away finds out by itself: the namespaces are gone.
fn forget(settings: &Settings, request: &Request) {
    drop(ask(&settings.socket, request, ANSWER_MAX));
}
