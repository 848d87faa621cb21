use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Which reply of the server gets lost, once.
#[derive(Debug, Clone, Copy)]
pub enum Loss {
    /// The reply to a statement whose text contains this.
    OfStatement(&'static str),
    /// The reply to the commit of a transaction with a statement that contains this.
    OfCommitAfter(&'static str),
}

/// A proxy between a worker and Postgres. When armed, it lets the server execute the
/// request, swallows the answer and cuts the connection: the worker cannot know whether
/// it happened. It can also take the server away, or let connections fall silent.
pub struct LossyProxy {
    /// The database's address through the proxy.
    pub url: String,
    losses: Arc<Losses>,
    silenced: watch::Sender<()>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Losses {
    armed: Mutex<Option<Loss>>,
    /// The server goes away with the lost reply.
    takes_away: AtomicBool,
    happened: AtomicUsize,
    /// How often each statement was executed.
    executed: Mutex<HashMap<String, usize>>,
    away: watch::Sender<bool>,
}

impl LossyProxy {
    pub async fn in_front_of(database_url: &str) -> Self {
        let mut url = url::Url::from_str(database_url).unwrap();
        let server = (
            url.host_str().unwrap().to_owned(),
            url.port().unwrap_or(5432),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        // The proxy has to read the traffic.
        url.set_query(Some("sslmode=disable"));
        let losses = Arc::<Losses>::default();
        let (stop, silenced) = (CancellationToken::new(), watch::Sender::new(()));
        let accepting = accept(listener, server, Arc::clone(&losses), silenced.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(accepting));
        Self {
            url: url.to_string(),
            losses,
            silenced,
            _stop: stop.drop_guard(),
        }
    }

    pub fn arm(&self, loss: Loss) {
        *self.losses.armed.lock().unwrap() = Some(loss);
    }

    /// As [`LossyProxy::arm`]; the server goes away with the reply.
    pub fn arm_and_take_away(&self, loss: Loss) {
        self.losses.takes_away.store(true, Ordering::SeqCst);
        self.arm(loss);
    }

    /// Cuts all connections, and each new one at once.
    pub fn take_away(&self) {
        self.losses.away.send_replace(true);
    }

    pub fn bring_back(&self) {
        self.losses.away.send_replace(false);
    }

    /// Passes nothing on any more in the connections of now, as after the failover of a
    /// server that vanished. They stay open. New connections work.
    pub fn silence_connections(&self) {
        self.silenced.send_replace(());
    }

    /// How many statements were executed whose text contains this.
    pub fn executed(&self, part: &str) -> usize {
        let executed = self.losses.executed.lock().unwrap();
        let matching = executed.iter().filter(|(text, _)| text.contains(part));
        matching.map(|(_, times)| times).sum()
    }

    /// How many replies were lost.
    pub fn happened(&self) -> usize {
        self.losses.happened.load(Ordering::SeqCst)
    }
}

async fn accept(
    listener: TcpListener,
    server: (String, u16),
    losses: Arc<Losses>,
    silenced: watch::Sender<()>,
) {
    while let Ok((client, _)) = listener.accept().await {
        let (server, losses) = (server.clone(), Arc::clone(&losses));
        let (mut away, mut silenced) = (losses.away.subscribe(), silenced.subscribe());
        tokio::spawn(async move {
            // The sockets stay open until the end of this scope.
            let mut passing_on = pin!(pass_on(client, server, losses));
            let silent = tokio::select! {
                // Nothing gets through once the server is away, or silent.
                biased;
                _ = away.wait_for(|away| *away) => false,
                _ = silenced.changed() => true,
                // An error only means that one side has closed the connection.
                _ = &mut passing_on => false,
            };
            if silent {
                let _ = away.wait_for(|away| *away).await;
            }
        });
    }
}

/// The state shared by the two directions of a connection.
#[derive(Default)]
struct Flow {
    /// How many times the server must report that it is ready: after the start, each
    /// simple query and each Sync.
    asked: AtomicUsize,
    losing: AtomicBool,
}

/// Ends, and with it the connection, as soon as one direction has ended.
async fn pass_on(client: TcpStream, server: (String, u16), losses: Arc<Losses>) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let flow = Flow::default();
    tokio::select! {
        ended = requests(from_client, to_server, &flow, &losses) => ended,
        ended = replies(from_server, to_client, &flow, &losses) => ended,
    }
}

async fn requests(
    mut client: OwnedReadHalf,
    mut server: OwnedWriteHalf,
    flow: &Flow,
    losses: &Losses,
) -> io::Result<()> {
    // The first message has no type.
    let start = read_body(&mut client).await?;
    flow.asked.fetch_add(1, Ordering::SeqCst);
    server.write_all(&start).await?;
    let mut reader = Statements::default();
    loop {
        let kind = client.read_u8().await?;
        let body = read_body(&mut client).await?;
        reader.read(kind, &body[4..]);
        if let Some(text) = &reader.now {
            let mut executed = losses.executed.lock().unwrap();
            *executed.entry(text.clone()).or_default() += 1;
        }
        if matches!(kind, b'Q' | b'S') {
            flow.asked.fetch_add(1, Ordering::SeqCst);
        }
        if reader.is_lost(&losses.armed) {
            flow.losing.store(true, Ordering::SeqCst);
        }
        server.write_all(&[&[kind][..], &body].concat()).await?;
    }
}

async fn replies(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    flow: &Flow,
    losses: &Losses,
) -> io::Result<()> {
    let mut ready = 0;
    loop {
        let kind = server.read_u8().await?;
        let body = read_body(&mut server).await?;
        ready += usize::from(kind == b'Z');
        if !flow.losing.load(Ordering::SeqCst) {
            client.write_all(&[&[kind][..], &body].concat()).await?;
        } else if kind == b'Z' && ready == flow.asked.load(Ordering::SeqCst) {
            // The server has executed everything it was asked.
            if losses.takes_away.load(Ordering::SeqCst) {
                losses.away.send_replace(true);
            }
            losses.happened.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
    }
}

/// Reads a message from its length on.
async fn read_body(from: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let length = from.read_u32().await?;
    let mut body = length.to_be_bytes().to_vec();
    body.resize(length as usize, 0);
    from.read_exact(&mut body[4..]).await?;
    Ok(body)
}

/// Tracks which statement a connection executes: its text is sent once, when it is
/// prepared; later only its name.
/// <https://www.postgresql.org/docs/current/protocol-message-formats.html>
#[derive(Default)]
struct Statements {
    prepared: HashMap<String, String>,
    in_transaction: Vec<String>,
    now: Option<String>,
}

impl Statements {
    fn read(&mut self, kind: u8, body: &[u8]) {
        self.now = None;
        let mut texts = body
            .split(|byte| *byte == 0)
            .map(|text| String::from_utf8_lossy(text).into_owned());
        let mut next = || texts.next().unwrap_or_default();
        match kind {
            b'P' => {
                let name = next();
                self.prepared.insert(name, next());
            }
            b'B' => {
                let _portal = next();
                let text = self.prepared.get(&next()).cloned().unwrap_or_default();
                self.executes(text);
            }
            b'Q' => self.executes(next()),
            _ => {}
        }
    }

    fn executes(&mut self, text: String) {
        if text.starts_with("BEGIN") {
            self.in_transaction.clear();
        }
        self.in_transaction.push(text.clone());
        self.now = Some(text);
    }

    /// Disarms the loss if it applies.
    fn is_lost(&self, armed: &Mutex<Option<Loss>>) -> bool {
        let Some(now) = &self.now else {
            return false;
        };
        let mut armed = armed.lock().unwrap();
        let lost = match *armed {
            None => false,
            Some(Loss::OfStatement(part)) => now.contains(part),
            Some(Loss::OfCommitAfter(part)) => {
                let before = &self.in_transaction;
                now.starts_with("COMMIT") && before.iter().any(|text| text.contains(part))
            }
        };
        if lost {
            *armed = None;
        }
        lost
    }
}
