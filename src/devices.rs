//! The GPUs of this machine that its worker hands out, and to whom.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Which GPUs a worker has, as the configuration says it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Gpus {
    /// Those of `CUDA_VISIBLE_DEVICES`, or else those that `nvidia-smi` lists.
    #[default]
    Auto,
    /// These, as `CUDA_VISIBLE_DEVICES` names them: indices or UUIDs.
    List(Vec<String>),
}

/// The forms in which it may be written.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "write \"auto\", 0 for none, or a list such as [\"0\", \"1\"]"
)]
enum Written {
    Word(String),
    Number(u64),
    List(Vec<Name>),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "a GPU is named by its index or its UUID")]
enum Name {
    Text(String),
    Index(u64),
}

impl TryFrom<Written> for Gpus {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let names = match written {
            Written::Word(word) if word == "auto" => return Ok(Self::Auto),
            // As it comes from the environment.
            Written::Word(word) if word == "0" => Vec::new(),
            Written::Number(0) => Vec::new(),
            Written::Word(_) | Written::Number(_) => {
                return Err(
                    "write \"auto\", 0 for none, or a list such as [\"0\", \"1\"]".to_owned(),
                );
            }
            Written::List(names) => names,
        };
        let names: Vec<String> = names
            .into_iter()
            .map(|name| match name {
                Name::Text(text) => text.trim().to_owned(),
                Name::Index(index) => index.to_string(),
            })
            .collect();
        for (nth, name) in names.iter().enumerate() {
            if name.is_empty() || name.contains([',', '\0']) {
                return Err(format!("`{name}` names no GPU"));
            }
            if names[..nth].contains(name) {
                return Err(format!("`{name}` is there twice"));
            }
        }
        Ok(Self::List(names))
    }
}

impl From<Gpus> for Written {
    fn from(gpus: Gpus) -> Self {
        match gpus {
            Gpus::Auto => Self::Word("auto".to_owned()),
            Gpus::List(names) => Self::List(names.into_iter().map(Name::Text).collect()),
        }
    }
}

/// The GPUs of one worker. Clones hand out the same ones.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    free: Arc<Mutex<VecDeque<String>>>,
    freed: watch::Sender<()>,
    total: usize,
}

/// Some GPUs that are one job's own until this is dropped.
#[derive(Debug)]
pub struct DeviceSet {
    names: Vec<String>,
    free: Arc<Mutex<VecDeque<String>>>,
    freed: watch::Sender<()>,
}

impl Devices {
    /// Devices of these names, which must differ.
    #[must_use]
    pub fn new(names: Vec<String>) -> Self {
        Self {
            total: names.len(),
            free: Arc::new(Mutex::new(names.into())),
            freed: watch::Sender::default(),
        }
    }

    /// So many devices that nobody else has, or `None` while fewer are free.
    /// The one that has been free the longest comes first.
    #[must_use]
    pub fn take(&self, count: usize) -> Option<DeviceSet> {
        let mut free = lock(&self.free);
        if free.len() < count {
            return None;
        }
        Some(DeviceSet {
            names: free.drain(..count).collect(),
            free: Arc::clone(&self.free),
            freed: self.freed.clone(),
        })
    }

    /// Changes whenever some come free.
    #[must_use]
    pub fn freed(&self) -> watch::Receiver<()> {
        self.freed.subscribe()
    }

    /// How many nobody has.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.free).len()
    }

    /// How many there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }
}

impl DeviceSet {
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        lock(&self.free).extend(self.names.drain(..));
        self.freed.send_replace(());
    }
}

fn lock(free: &Mutex<VecDeque<String>>) -> MutexGuard<'_, VecDeque<String>> {
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
