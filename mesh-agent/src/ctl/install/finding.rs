//! Owns what checks find: one row each, with what to do about it.

use serde::{Deserialize, Serialize};

use crate::ctl::{
    CtlError, Output, print,
    table::{Align, Table},
};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Grade {
    /// As it should be.
    Good,
    /// It works, and may not be meant so.
    Warning,
    /// It does not work.
    Error,
}

/// One answer of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) subject: String,
    pub(crate) grade: Grade,
    /// What was found.
    pub(crate) message: String,
    /// What to do, empty where nothing is to be done.
    pub(crate) advice: String,
}

impl Finding {
    pub(crate) fn good(subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self { subject: subject.into(), grade: Grade::Good, message: message.into(), advice: String::new() }
    }

    pub(crate) fn warning(
        subject: impl Into<String>,
        message: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            subject: subject.into(),
            grade: Grade::Warning,
            message: message.into(),
            advice: advice.into(),
        }
    }

    pub(crate) fn error(
        subject: impl Into<String>,
        message: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { grade: Grade::Error, ..Self::warning(subject, message, advice) }
    }
}

/// Prints findings. Whether none of them is an error.
pub(crate) fn show(findings: &[Finding], out: Output) -> Result<bool, CtlError> {
    print(out, &findings, |findings| render(findings))?;
    Ok(findings.iter().all(|finding| finding.grade != Grade::Error))
}

fn render(findings: &[Finding]) -> String {
    let mut table = Table::new(&[
        ("CHECK", Align::Left),
        ("RESULT", Align::Left),
        ("FOUND", Align::Left),
        ("WHAT TO DO", Align::Left),
    ]);
    for finding in findings {
        let grade = match finding.grade {
            Grade::Good => "good",
            Grade::Warning => "warning",
            Grade::Error => "ERROR",
        };
        table.row([
            finding.subject.clone(),
            grade.to_owned(),
            finding.message.clone(),
            finding.advice.clone(),
        ]);
    }
    let count = |grade| findings.iter().filter(|finding| finding.grade == grade).count();
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    let (errors, warnings) = (count(Grade::Error), count(Grade::Warning));
    format!("{}\n{}, {}\n", table.render(), plural(errors, "error"), plural(warnings, "warning"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_to_do_and_is_counted() {
        let findings =
            [Finding::good("kernel", "6.18.0"), Finding::error("node n2", "has no agent", "see its events")];
        let text = render(&findings);
        assert!(text.contains("node n2  ERROR   has no agent  see its events\n"), "{text}");
        assert!(text.ends_with("\n1 error, 0 warnings\n"), "{text}");
    }
}
