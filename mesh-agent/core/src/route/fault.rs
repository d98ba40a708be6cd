//! Faults that are injected into a request.

use std::time::Duration;

use crate::route::http::{Abort, Fault};

/// What was drawn for one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrawnFault {
    /// It waits first.
    pub delay: Option<Duration>,
    /// Then it is answered so instead of being forwarded.
    pub abort: Option<Abort>,
}

impl Fault {
    /// Draws delay and abort, each on its own (S21); `draw` is one random word.
    pub fn draw(&self, draw: u64) -> DrawnFault {
        let halves = [(draw & u64::from(u32::MAX)) as u32, (draw >> 32) as u32];
        DrawnFault {
            delay: self.delay.filter(|(share, _)| share.hits(halves[0])).map(|(_, delay)| delay),
            abort: self.abort.filter(|(share, _)| share.hits(halves[1])).map(|(_, abort)| abort),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{balance::Draws, route::http::Millionths};

    #[test]
    fn a_share_of_everything_always_hits_and_one_of_nothing_never() {
        let fault = |share| Fault {
            delay: Some((share, Duration::from_secs(7))),
            abort: Some((share, Abort::Http(500))),
        };
        for draw in [0, 1, u64::MAX, 1 << 32, u64::from(u32::MAX)] {
            let all = fault(Millionths::ALL).draw(draw);
            assert_eq!((all.delay, all.abort), (Some(Duration::from_secs(7)), Some(Abort::Http(500))));
            assert_eq!(fault(Millionths(0)).draw(draw), DrawnFault::default());
        }
    }

    #[test]
    fn delay_and_abort_are_drawn_independently() {
        let half = Millionths(500_000);
        let fault = Fault { delay: Some((half, Duration::ZERO)), abort: Some((half, Abort::Grpc(14))) };
        let mut draws = Draws::new(7);
        let mut seen = [0_u32; 4];
        for _ in 0..40_000 {
            let drawn = fault.draw(draws.word());
            seen[usize::from(drawn.delay.is_some()) * 2 + usize::from(drawn.abort.is_some())] += 1;
        }
        assert!(seen.iter().all(|count| (9_500..10_500).contains(count)), "{seen:?}");
    }
}
