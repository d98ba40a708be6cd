//! Owns how numbers are written for people: sizes, rates, times.

/// A count of bytes in powers of 1024 with three digits, e.g. `12.3 MiB`.
pub(super) fn bytes(n: f64) -> String {
    scaled(n, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// A plain number in powers of 1000, e.g. `12.3k`.
pub(super) fn count(n: f64) -> String {
    let text = scaled(n, 1000.0, &["", "k", "M", "G", "T"]);
    text.replace(' ', "")
}

/// A number of things: `1 pod`, `2 pods`.
pub(super) fn counted(n: usize, thing: &str) -> String {
    if n == 1 { format!("1 {thing}") } else { format!("{n} {thing}s") }
}

/// Nanoseconds in the unit that suits them, e.g. `53.1 µs`.
pub(super) fn nanos(ns: f64) -> String {
    match ns {
        ns if ns >= 1e9 => format!("{} s", digits(ns / 1e9)),
        ns if ns >= 1e6 => format!("{} ms", digits(ns / 1e6)),
        ns if ns >= 1e3 => format!("{} µs", digits(ns / 1e3)),
        ns => format!("{} ns", digits(ns)),
    }
}

/// A value of a histogram in the unit its name ends in.
pub(super) fn by_unit(name: &str, value: f64) -> String {
    if name.ends_with("_ns") {
        nanos(value)
    } else if name.ends_with("_us") {
        nanos(value * 1e3)
    } else {
        count(value)
    }
}

/// Seconds as `3d4h`, `2h5m`, `4m12s` or `1.5s`.
pub(super) fn age(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        86_400.. => format!("{}d{}h", s / 86_400, s % 86_400 / 3600),
        3600.. => format!("{}h{}m", s / 3600, s % 3600 / 60),
        60.. => format!("{}m{}s", s / 60, s % 60),
        _ => format!("{:.1}s", seconds.max(0.0)),
    }
}

fn scaled(n: f64, step: f64, units: &[&str]) -> String {
    let mut n = n;
    let mut unit = 0;
    // The rounded form decides, so that 999 960 is 1.00M and not 1000k.
    while n >= step * 0.9995 && unit + 1 < units.len() {
        n /= step;
        unit += 1;
    }
    let number = if unit == 0 && n.fract() == 0.0 { format!("{n:.0}") } else { digits(n) };
    format!("{number} {}", units.get(unit).copied().unwrap_or_default())
}

/// Three significant digits.
fn digits(n: f64) -> String {
    match n {
        n if n >= 99.95 => format!("{n:.0}"),
        n if n >= 9.995 => format!("{n:.1}"),
        n if n > 0.0 => format!("{n:.2}"),
        _ => "0".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_keep_three_digits() {
        for (n, want) in
            [(0.0, "0 B"), (1023.0, "1023 B"), (1024.0, "1.00 KiB"), (12.5 * 1_048_576.0, "12.5 MiB")]
        {
            assert_eq!(bytes(n), want);
        }
        for (n, want) in
            [(0.0, "0"), (7.0, "7"), (0.5, "0.50"), (999.0, "999"), (12_345.0, "12.3k"), (999_960.0, "1.00M")]
        {
            assert_eq!(count(n), want);
        }
    }

    #[test]
    fn times_are_written_in_the_unit_that_suits_them() {
        for (ns, want) in
            [(0.0, "0 ns"), (185.0, "185 ns"), (53_100.0, "53.1 µs"), (2.5e6, "2.50 ms"), (3e9, "3.00 s")]
        {
            assert_eq!(nanos(ns), want);
        }
        for (s, want) in [(1.5, "1.5s"), (252.0, "4m12s"), (7500.0, "2h5m"), (273_600.0, "3d4h")] {
            assert_eq!(age(s), want);
        }
        assert_eq!(counted(1, "pod") + ", " + &counted(0, "pod"), "1 pod, 0 pods");
        assert_eq!(by_unit("srtt_us", 120.0), "120 µs");
        assert_eq!(by_unit("connect_ns", 120.0), "120 ns");
    }
}
