//! The commands of a document: what a reader would type.
//!
//! A fenced block without a language, or with `sh`, holds commands; one with any other language (`text`, `yaml`) holds none. Between
//! single back-ticks, what begins with one of [`PROGRAMS`] and a blank is a command too. Comments after a command are not part of it;
//! a here-document and lines that end with a backslash are.

/// The programs that documents tell people to run.
pub const PROGRAMS: [&str; 4] = ["meshctl", "mesh-agent", "kubectl", "helm"];

/// A command, and the line of the document on which it begins, from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Its line.
    pub line: usize,
    /// What a shell would read.
    pub text: String,
}

/// All commands of a document, in their order; the same one may come several times.
#[must_use]
pub fn commands(markdown: &str) -> Vec<Command> {
    let mut found = Vec::new();
    let mut fence: Option<bool> = None;
    // A block of a list is further right than the text.
    let mut indent = 0;
    let mut lines = markdown.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            indent = line.len() - line.trim_start().len();
            fence = match fence {
                Some(_) => None,
                None => Some(matches!(language.trim(), "" | "sh")),
            };
            continue;
        }
        match fence {
            None => found.extend(quoted(line).map(|text| Command { line: index + 1, text })),
            Some(false) => {}
            Some(true) => {
                let mut text = without_comment(line.get(indent..).unwrap_or_default()).to_owned();
                while let Some(begun) = text.strip_suffix('\\') {
                    let Some((_, next)) = lines.next() else { break };
                    text = format!("{}{}", begun, without_comment(next).trim_start());
                }
                if let Some(end) = here_document(&text) {
                    for (_, next) in lines.by_ref() {
                        let next = next.get(indent..).unwrap_or_default();
                        text = format!("{text}\n{next}");
                        if next == end {
                            break;
                        }
                    }
                }
                if !text.is_empty() {
                    found.push(Command { line: index + 1, text });
                }
            }
        }
    }
    found
}

/// A comment is what follows ` #`, as in a shell, or a whole line.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with('#') {
        return "";
    }
    line.split_once(" #").map_or(line, |(command, _)| command).trim_end()
}

/// The word that ends a here-document, if the command has one.
fn here_document(command: &str) -> Option<String> {
    let (_, word) = command.split_once("<<")?;
    Some(word.trim_matches(['\'', '"', ' ']).to_owned())
}

fn quoted(line: &str) -> impl Iterator<Item = String> {
    let is_command =
        |text: &&str| text.split_once(' ').is_some_and(|(program, _)| PROGRAMS.contains(&program));
    line.split('`').skip(1).step_by(2).filter(is_command).map(ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(markdown: &str) -> Vec<(usize, String)> {
        commands(markdown).into_iter().map(|command| (command.line, command.text)).collect()
    }

    #[test]
    fn fenced_lines_are_commands_without_their_comments() {
        let text = "Do:\n\n```\nmeshctl status     # every node\n\n# nothing\nls 'a#b'\n```\n```sh\nkubectl get pods\n```\n";
        let wanted = [(4, "meshctl status"), (7, "ls 'a#b'"), (10, "kubectl get pods")];
        assert_eq!(found(text), wanted.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn a_block_of_a_list_is_read_from_where_it_begins() {
        let wanted = [(3, "cat <<END\n  a\nEND")];
        let text = "- as in:\n  ```\n  cat <<END\n    a\n  END\n  ```\n";
        assert_eq!(found(text), wanted.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn blocks_of_another_language_are_no_commands() {
        assert_eq!(found("```text\nmeshctl status\n```\n```yaml\nkind: Pod\n```\n"), []);
    }

    #[test]
    fn here_documents_and_continued_lines_are_one_command() {
        let text =
            "```\nkubectl apply -f - <<END\nkind: Pod # stays\nEND\nmeshctl install \\\n  --no-wait\n```\n";
        let wanted =
            [(2, "kubectl apply -f - <<END\nkind: Pod # stays\nEND"), (5, "meshctl install --no-wait")];
        assert_eq!(found(text), wanted.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn quoted_commands_count_and_other_quoted_words_do_not() {
        let text = "Ask `meshctl status`, see `status.podIP`, `meshctl`, or | `kubectl get pods -A` |.";
        let wanted = [(1, "meshctl status"), (1, "kubectl get pods -A")];
        assert_eq!(found(text), wanted.map(|(line, text)| (line, text.to_owned())));
    }
}
