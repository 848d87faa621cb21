//! A job's private directory: kept between its attempts on one machine, gone
//! when it has ended.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;
use uuid::Uuid;

/// A huge one may take longer, and is removed beside what comes next.
const REMOVAL: Duration = Duration::from_secs(10);

/// Only this user gets in.
const PRIVATE: u32 = 0o700;

/// Makes the job's directory, unless an earlier attempt has.
///
/// # Errors
/// It cannot be made, or what is there is not this user's own directory: in a
/// folder that everybody may write to, somebody else may have put it there.
pub(super) async fn create(root: &Path, job_id: Uuid) -> io::Result<PathBuf> {
    let root = std::path::absolute(root)?;
    blocking(move || {
        let mut builder = DirBuilder::new();
        builder.mode(PRIVATE);
        builder.recursive(true).create(&root)?;
        let owner = owner_of(&root)?;
        let folder = root.join(job_id.to_string());
        match builder.recursive(false).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| folder),
        }
        let found = fs::symlink_metadata(&folder)?;
        match found.is_dir() && [me(), owner].contains(&found.uid()) {
            true => Ok(folder),
            false => Err(not_ours(&folder)),
        }
    })
    .await
}

/// Removes it, as far as it lets itself be removed: a job that has ended has
/// ended.
pub(super) async fn remove(folder: PathBuf) {
    let path = folder.display().to_string();
    let removal = blocking(move || fs::remove_dir_all(folder));
    match tokio::time::timeout(REMOVAL, removal).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => warn!(%path, %error, "a work directory could not be removed"),
    }
}

/// Who could exchange what is in it. Where everybody may make a folder, as in
/// /tmp, it must be nobody else's.
fn owner_of(root: &Path) -> io::Result<u32> {
    const OTHERS_WRITE: u32 = 0o002;
    let owner = fs::metadata(root)?.uid();
    let anybodys = match root.parent() {
        Some(parent) => fs::metadata(parent)?.mode() & OTHERS_WRITE != 0,
        None => false,
    };
    match anybodys && ![0, me()].contains(&owner) {
        true => Err(not_ours(root)),
        false => Ok(owner),
    }
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn not_ours(folder: &Path) -> io::Error {
    io::Error::other(format!(
        "{} is not a directory of this user's own",
        folder.display()
    ))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[tokio::test]
    async fn it_is_private_and_the_same_for_each_attempt() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("a/b");
        let folder = create(&root, Uuid::nil()).await.unwrap();
        let mode = fs::metadata(&folder).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::write(folder.join("weights"), "w").unwrap();
        assert_eq!(create(&root, Uuid::nil()).await.unwrap(), folder);
        assert!(folder.join("weights").exists());
        remove(folder.clone()).await;
        assert!(!folder.exists());
    }

    #[tokio::test]
    async fn a_directory_that_somebody_else_could_have_put_there_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), root.path().join(Uuid::nil().to_string())).unwrap();
        assert!(create(root.path(), Uuid::nil()).await.is_err());
    }
}
