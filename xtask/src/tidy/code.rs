//! Owns telling Rust code from comments and literals.

/// The text with comments and the insides of string and character literals blanked; lines stay lines.
///
/// Good enough for well-formed files: rules that use it look for words, not for syntax.
pub(super) fn only_code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = skipped_len(rest, &out);
        let len = skipped.unwrap_or(first.len_utf8());
        let (taken, after) = rest.split_at(len);
        if skipped.is_some() {
            out.extend(taken.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        } else {
            out.push_str(taken);
        }
        rest = after;
    }
    out
}

/// Length in bytes of the comment or literal that starts here, if one does.
fn skipped_len(rest: &str, before: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(block_comment_len(rest));
    }
    if rest.starts_with('"') {
        return Some(string_len(rest));
    }
    let after_word = before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
    if rest.starts_with('r') && !after_word {
        return raw_string_len(rest);
    }
    if rest.starts_with('\'') {
        return char_len(rest);
    }
    None
}

fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while let Some(tail) = rest.get(at..) {
        if tail.is_empty() {
            break;
        } else if tail.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += tail.chars().next().map_or(1, char::len_utf8);
        }
    }
    at.min(rest.len())
}

fn string_len(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

/// `r"…"` or `r#"…"#` with any number of hashes; `None` for a raw identifier or a plain word.
fn raw_string_len(rest: &str) -> Option<usize> {
    let hashes = rest.get(1..)?.chars().take_while(|&c| c == '#').count();
    let body = rest.get(1 + hashes..)?.strip_prefix('"')?;
    let closing = format!("\"{}", "#".repeat(hashes));
    let opening = 2 + hashes;
    Some(body.find(&closing).map_or(rest.len(), |end| opening + end + closing.len()))
}

/// A character literal, told from a lifetime by its closing quote.
fn char_len(rest: &str) -> Option<usize> {
    let mut chars = rest.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        let (_, _escaped) = chars.next()?;
        return chars.find(|&(_, c)| c == '\'').map(|(at, _)| at + 1);
    }
    chars.next().filter(|&(_, c)| c == '\'').map(|(at, _)| at + 1)
}

/// Whether `word` stands in `code` on its own, not as a part of a longer name.
pub(super) fn has_word(code: &str, word: &str) -> bool {
    around(code, word).any(|_| true)
}

/// Whether `code` names the crate `name`: in a path or in a `use`.
pub(super) fn names_crate(code: &str, name: &str) -> bool {
    around(code, name).any(|(before, after)| {
        // `a::name::b` is a module of that name.
        let is_first =
            !before.ends_with(|c: char| c.is_alphanumeric() || c == ':') || before.ends_with(" ::");
        let is_use = before.trim_end().ends_with("use") || before.trim_end().ends_with("extern crate");
        (is_first && after.starts_with("::")) || is_use
    })
}

/// What stands before and after each place where `word` is a whole name.
fn around<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    let places = code.match_indices(word).map(move |(at, _)| code.split_at(at));
    let places = places.map(move |(before, from)| (before, from.get(word.len()..).unwrap_or_default()));
    places.filter(move |(before, after)| !before.ends_with(part_of_name) && !after.starts_with(part_of_name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, has: bool) {
        assert_eq!(has_word(&only_code(text), "word"), has, "{text}");
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        check("word", true);
        check("// word", false);
        check("/* a /* nested */ word */", false);
        check("/* a */ word", true);
        check(r#"let s = "word";"#, false);
        check(r#"let s = "\" word";"#, false);
        check(r#"let s = "\\"; word()"#, true);
        check("let s = r\"\\\"; word()", true);
        check("let s = r#\"\" word\"#;", false);
        check("let c = '\"'; word()", true);
        check(r"let c = '\''; word()", true);
        check("fn f<'a>(x: &'a str) { word() }", true);
        check("let sword = wordy;", false);
    }

    #[test]
    fn a_crate_is_named_by_a_path_or_a_use() {
        for code in
            ["use nix;", "use nix as n;", "nix::fork()", "use {nix::a, b}", "let x = ::nix::a;", "f(nix::a)"]
        {
            assert!(names_crate(code, "nix"), "{code}");
        }
        for code in ["let nix = 1;", "use unix::a;", "crate::nix::a()", "fn nix() {}"] {
            assert!(!names_crate(code, "nix"), "{code}");
        }
    }

    #[test]
    fn lines_stay_where_they_are() {
        let text = "a\n/* b\nc */ d\n\"e\nf\" g";
        assert_eq!(only_code(text).lines().count(), text.lines().count());
    }
}
