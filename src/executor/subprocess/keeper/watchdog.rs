//! Follows the lifeline, and stops the command when `ValidUntil` passes.

use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;

use super::super::lifeline::{Moment, Order};
use super::process_tree::ProcessGroup;

/// The socket takes a timeout of zero for no timeout.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);
/// The socket's clock stands still while the machine is suspended.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
enum Phase {
    Valid { until: Moment },
    Stopping { kill_at: Moment },
    Killed,
}

/// Returns when the daemon is gone and the process group has been killed.
pub(super) fn watch(
    mut orders: BufReader<UnixStream>,
    group: &ProcessGroup,
    grace: Duration,
    valid_until: Moment,
) {
    let mut phase = Phase::Valid { until: valid_until };
    let mut line = Vec::new();
    loop {
        phase = match phase {
            Phase::Valid { until } if until.left().is_zero() => {
                group.expire();
                // After a freeze the grace may be over too: another worker
                // may have started the job.
                terminate(group, until.after(grace))
            }
            Phase::Stopping { kill_at } if kill_at.left().is_zero() => {
                group.signal(Signal::KILL);
                Phase::Killed
            }
            unchanged => unchanged,
        };
        match next(&mut orders, &mut line, wait(phase)) {
            Ok(None) => {}
            Ok(Some(Order::Terminate)) => {
                if let Phase::Valid { .. } = phase {
                    phase = terminate(group, Moment::now().after(grace));
                }
            }
            Ok(Some(Order::ValidUntil(until))) => {
                if let Phase::Valid { .. } = phase {
                    phase = Phase::Valid { until };
                }
            }
            Err(_) => return group.signal(Signal::KILL),
        }
    }
}

fn terminate(group: &ProcessGroup, kill_at: Moment) -> Phase {
    if kill_at.left().is_zero() {
        group.signal(Signal::KILL);
        return Phase::Killed;
    }
    group.signal(Signal::TERM);
    // A stopped process handles SIGTERM only after it continues.
    group.signal(Signal::CONT);
    Phase::Stopping { kill_at }
}

fn wait(phase: Phase) -> Duration {
    match phase {
        Phase::Valid { until } => until.left(),
        Phase::Stopping { kill_at } => kill_at.left(),
        Phase::Killed => LONGEST_WAIT,
    }
    .clamp(SHORTEST_WAIT, LONGEST_WAIT)
}

/// The next order, or `None` if none came in time.
///
/// # Errors
/// The daemon is gone, or sent an invalid line.
fn next(
    orders: &mut BufReader<UnixStream>,
    line: &mut Vec<u8>,
    wait: Duration,
) -> io::Result<Option<Order>> {
    orders.get_ref().set_read_timeout(Some(wait))?;
    match orders.read_until(b'\n', line) {
        Ok(_) if line.ends_with(b"\n") => {
            let order = serde_json::from_slice(line)?;
            line.clear();
            Ok(Some(order))
        }
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        // A partial line stays in the buffer until the rest comes.
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => {
                Ok(None)
            }
            _ => Err(error),
        },
    }
}
