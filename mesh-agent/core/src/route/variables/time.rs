//! Times as texts, in UTC, by the letters of `strftime` and those that Envoy adds for fractions of a second.

use std::{fmt::Write as _, time::Duration};

/// What a time looks like when nothing is said about it.
const DEFAULT: &str = "%Y-%m-%dT%H:%M:%E3SZ";
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAY_S: u64 = 86_400;

/// A letter that is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("%{letters} is no part of a time")]
pub struct TimeError {
    letters: Box<str>,
}

/// How a time is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TimeFormat(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Letter(char),
    /// So many digits of the second's fraction.
    Fraction(usize),
    /// Seconds with so many digits behind the point.
    Seconds(usize),
}

/// A moment in the calendar.
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 0, since 1 January.
    day_of_year: u64,
    /// From Sunday, 0.
    weekday: usize,
    second_of_day: u64,
    epoch_s: u64,
    nanos: u32,
}

impl TimeFormat {
    /// Reads a format; an empty one is Envoy's own.
    pub(super) fn parse(format: &str) -> Result<Self, TimeError> {
        let mut letters = if format.is_empty() { DEFAULT } else { format }.chars().peekable();
        let mut parts = Vec::new();
        let mut text = String::new();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                text.push(letter);
                continue;
            }
            let unknown = |letters: String| TimeError { letters: letters.into() };
            let part = match letters.next() {
                Some('%') => {
                    text.push('%');
                    continue;
                }
                Some('n') => {
                    // A header has one line.
                    text.push(' ');
                    continue;
                }
                Some('t') => {
                    text.push('\t');
                    continue;
                }
                Some('f') => Part::Fraction(9),
                Some(digit @ '1'..='9') => match letters.next() {
                    Some('f') => Part::Fraction(digits(digit)),
                    other => return Err(unknown(format!("{digit}{}", other.unwrap_or(' ')))),
                },
                Some('E') => match (letters.next(), letters.peek()) {
                    (Some(digit @ '1'..='9'), Some('S')) => {
                        letters.next();
                        Part::Seconds(digits(digit))
                    }
                    (Some(digit @ '1'..='9'), Some('f')) => {
                        letters.next();
                        Part::Fraction(digits(digit))
                    }
                    (other, _) => return Err(unknown(format!("E{}", other.unwrap_or(' ')))),
                },
                Some(letter) if "YmdHMSFTyejaAbBZzsDRIp".contains(letter) => Part::Letter(letter),
                other => return Err(unknown(other.map(String::from).unwrap_or_default())),
            };
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text).into()));
            }
            parts.push(part);
        }
        if !text.is_empty() {
            parts.push(Part::Text(text.into()));
        }
        Ok(Self(parts))
    }

    /// Writes a time since the beginning of 1970.
    pub(super) fn apply(&self, since: Duration) -> String {
        let moment = Moment::of(since);
        let mut text = String::new();
        for part in &self.0 {
            // Writing to a string cannot fail.
            match part {
                Part::Text(own) => text.push_str(own),
                Part::Letter(letter) => moment.letter(*letter, &mut text),
                Part::Fraction(digits) => text.push_str(&moment.fraction(*digits)),
                Part::Seconds(digits) => {
                    write!(text, "{:02}.{}", moment.second_of_day % 60, moment.fraction(*digits)).ok();
                }
            }
        }
        text
    }
}

fn digits(digit: char) -> usize {
    digit.to_digit(10).map_or(9, |digit| digit as usize)
}

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const fn days_of_month(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

impl Moment {
    fn of(since: Duration) -> Self {
        let epoch_s = since.as_secs();
        let days = epoch_s / DAY_S;
        // 400 years have 146 097 days, so that what is left to count is bounded.
        let mut year = 1970 + days / 146_097 * 400;
        let mut left = days % 146_097;
        loop {
            let of_year = if is_leap(year) { 366 } else { 365 };
            if left < of_year {
                break;
            }
            left -= of_year;
            year += 1;
        }
        let day_of_year = left;
        let mut month = 0;
        while left >= days_of_month(year, month) {
            left -= days_of_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: left + 1,
            day_of_year,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4) % 7) as usize,
            second_of_day: epoch_s % DAY_S,
            epoch_s,
            nanos: since.subsec_nanos(),
        }
    }

    fn fraction(&self, digits: usize) -> String {
        let mut all = format!("{:09}", self.nanos);
        all.truncate(digits);
        all
    }

    fn letter(&self, letter: char, text: &mut String) {
        let (hour, minute, second) =
            (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        let (year, month, day) = (self.year, self.month + 1, self.day);
        let weekday = DAYS.get(self.weekday).copied().unwrap_or_default();
        let month_name = MONTHS.get(self.month).copied().unwrap_or_default();
        // Writing to a string cannot fail.
        match letter {
            'Y' => write!(text, "{year}"),
            'm' => write!(text, "{month:02}"),
            'd' => write!(text, "{day:02}"),
            'H' => write!(text, "{hour:02}"),
            'M' => write!(text, "{minute:02}"),
            'S' => write!(text, "{second:02}"),
            'F' => write!(text, "{year}-{month:02}-{day:02}"),
            'T' => write!(text, "{hour:02}:{minute:02}:{second:02}"),
            'y' => write!(text, "{:02}", year % 100),
            'e' => write!(text, "{day:2}"),
            'j' => write!(text, "{:03}", self.day_of_year + 1),
            'a' => write!(text, "{}", &weekday[..3]),
            'A' => write!(text, "{weekday}"),
            'b' => write!(text, "{}", &month_name[..3]),
            'B' => write!(text, "{month_name}"),
            'Z' => write!(text, "UTC"),
            'z' => write!(text, "+0000"),
            's' => write!(text, "{}", self.epoch_s),
            'D' => write!(text, "{month:02}/{day:02}/{:02}", year % 100),
            'R' => write!(text, "{hour:02}:{minute:02}"),
            'I' => write!(text, "{:02}", (hour + 11) % 12 + 1),
            'p' => write!(text, "{}", if hour < 12 { "AM" } else { "PM" }),
            _ => Ok(()),
        }
        .ok();
    }
}
