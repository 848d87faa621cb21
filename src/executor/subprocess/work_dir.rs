//! A job's private directory. The job's attempts on one machine share it. It is
//! removed when the job ends here, or a week later if the job ended elsewhere.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use tracing::{info, warn};
use uuid::Uuid;

/// Removing a huge directory may take longer; then it goes on in the background.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// A directory that has not changed for this long belongs to no running job.
const OLD: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Accessible to this user only.
const PRIVATE: u32 = 0o700;

/// A job's directory in use. Nobody tidies it up while this exists, in whichever
/// process, however long it does not change.
#[derive(Debug)]
pub(super) struct WorkDir {
    pub(super) path: PathBuf,
    /// A shared lock, which the kernel takes back from a process that dies. None
    /// where the file system has no locks.
    _lock: Option<fs::File>,
}

/// Creates the job's directory, unless it exists.
///
/// # Errors
/// It cannot be created, or it belongs to another user: in a world-writable
/// folder anybody can create it first.
pub(super) async fn create(root: &Path, job_id: Uuid) -> io::Result<WorkDir> {
    let root = std::path::absolute(root)?;
    blocking(move || {
        let mut builder = DirBuilder::new();
        builder.mode(PRIVATE);
        builder.recursive(true).create(&root)?;
        let owner = owner_of(&root)?;
        let folder = root.join(job_id.to_string());
        match builder.recursive(false).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created.map(|()| WorkDir::of(folder)),
        }
        let found = fs::symlink_metadata(&folder)?;
        match found.is_dir() && [me(), owner].contains(&found.uid()) {
            true => {
                // Marks it as in use. A network file system may refuse.
                let _ = fs::File::open(&folder)
                    .and_then(|folder| folder.set_modified(SystemTime::now()));
                Ok(WorkDir::of(folder))
            }
            false => Err(not_ours(&folder)),
        }
    })
    .await
}

impl WorkDir {
    fn of(path: PathBuf) -> Self {
        let lock = fs::File::open(&path).ok();
        let lock = lock.filter(|folder| flock(folder, FlockOperation::LockShared).is_ok());
        Self { path, _lock: lock }
    }
}

/// Locks the directory against use; None if some process uses it now.
fn lock_unless_in_use(path: &Path) -> Option<fs::File> {
    let folder = fs::File::open(path).ok()?;
    let lock = flock(&folder, FlockOperation::NonBlockingLockExclusive);
    (lock != Err(rustix::io::Errno::WOULDBLOCK)).then_some(folder)
}

/// Removes the directory. A failure is only logged.
pub(super) async fn remove(folder: PathBuf) {
    let path = folder.display().to_string();
    let removal = blocking(move || remove_all(&folder));
    match tokio::time::timeout(REMOVAL_LIMIT, removal).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(Err(error)) => warn!(%path, %error, "cannot remove a work directory"),
    }
}

fn remove_all(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        // The job may have removed its own write permission.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            make_accessible(folder);
            fs::remove_dir_all(folder)
        }
        removed => removed,
    }
}

/// Errors are ignored: the removal reports them.
fn make_accessible(folder: &Path) {
    let _ = fs::set_permissions(folder, Permissions::from_mode(PRIVATE));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Symbolic links are not followed.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            make_accessible(&entry.path());
        }
    }
}

/// Checks that directories can be created in the folder.
///
/// # Errors
/// They cannot.
pub async fn probe(root: &Path) -> io::Result<()> {
    let probe = Uuid::now_v7();
    let folder = create(root, probe).await?;
    blocking(move || fs::remove_dir(&folder.path)).await
}

/// Removes directories that have not changed for a week and that no run uses.
pub async fn tidy(root: PathBuf) {
    let tidied = blocking(move || {
        for (folder, _lock) in old_ones(&root)? {
            let path = folder.display();
            match remove_all(&folder) {
                Ok(()) => info!(%path, "removed an old work directory"),
                Err(error) => warn!(%path, %error, "cannot remove an old work directory"),
            }
        }
        Ok(())
    });
    if let Err(error) = tidied.await {
        warn!(%error, "cannot read the folder of the work directories");
    }
}

/// Each with a lock that keeps runs from beginning in it.
fn old_ones(root: &Path) -> io::Result<Vec<(PathBuf, fs::File)>> {
    let Some(limit) = SystemTime::now().checked_sub(OLD) else {
        return Ok(Vec::new());
    };
    let jobs = fs::read_dir(root)?.flatten().filter(|entry| {
        let name = entry.file_name();
        let is_jobs = name
            .to_str()
            .is_some_and(|name| Uuid::parse_str(name).is_ok());
        is_jobs && entry.file_type().is_ok_and(|kind| kind.is_dir())
    });
    let paths = jobs.map(|entry| entry.path());
    let unused = paths.filter_map(|path| Some((lock_unless_in_use(&path)?, path)));
    let old = unused.filter(|(_, path)| is_old(path, limit));
    Ok(old.map(|(lock, path)| (path, lock)).collect())
}

/// Checks every file, as a folder's own time covers its direct entries only.
fn is_old(path: &Path, limit: SystemTime) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return false;
    };
    let inside = metadata.is_dir().then(|| fs::read_dir(path));
    let mut entries = inside.into_iter().flatten().flatten().flatten();
    metadata.modified().is_ok_and(|modified| modified < limit)
        && entries.all(|entry| is_old(&entry.path(), limit))
}

/// The folder's owner. If its parent is world-writable, like /tmp, the owner must
/// be this user or root.
fn owner_of(root: &Path) -> io::Result<u32> {
    const OTHERS_WRITE: u32 = 0o002;
    let owner = fs::metadata(root)?.uid();
    let parent_is_world_writable = match root.parent() {
        Some(parent) => fs::metadata(parent)?.mode() & OTHERS_WRITE != 0,
        None => false,
    };
    match parent_is_world_writable && ![0, me()].contains(&owner) {
        true => Err(not_ours(root)),
        false => Ok(owner),
    }
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn not_ours(folder: &Path) -> io::Error {
    io::Error::other(format!(
        "{} is not a directory of this user",
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
    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test]
    async fn it_is_private_and_the_same_for_each_attempt() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("a/b");
        let folder = create(&root, Uuid::nil()).await.unwrap();
        let path = folder.path.clone();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::write(path.join("weights"), "w").unwrap();
        assert_eq!(create(&root, Uuid::nil()).await.unwrap().path, path);
        assert!(path.join("weights").exists());
        remove(path.clone()).await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_directory_without_write_permission_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let folder = create(root.path(), Uuid::nil()).await.unwrap().path;
        let inner = folder.join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("weights"), "w").unwrap();
        fs::set_permissions(&inner, Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(folder.join("a"), Permissions::from_mode(0o000)).unwrap();
        remove(folder.clone()).await;
        assert!(!folder.exists());
    }

    #[tokio::test]
    async fn only_old_directories_of_jobs_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let eight_days_ago = SystemTime::now() - Duration::from_secs(8 * 24 * 60 * 60);
        let age = |path: &Path| {
            let file = fs::File::open(path).unwrap();
            file.set_modified(eight_days_ago).unwrap();
        };
        let mut folders = Vec::new();
        for name in [1, 2, 3].map(|n| Uuid::from_u128(n).to_string()) {
            folders.push(root.path().join(name));
        }
        folders.push(root.path().join("somebody else's"));
        for (nth, folder) in folders.iter().enumerate() {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("file"), "").unwrap();
            if nth != 1 {
                age(&folder.join("file"));
            }
            if nth != 2 {
                age(folder);
            }
        }
        tidy(root.path().to_owned()).await;
        let there: Vec<bool> = folders.iter().map(|folder| folder.exists()).collect();
        assert_eq!(there, [false, true, true, true]);
    }

    #[tokio::test]
    async fn an_old_directory_in_which_a_job_runs_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let used = create(root.path(), Uuid::nil()).await.unwrap();
        let eight_days_ago = SystemTime::now() - Duration::from_secs(8 * 24 * 60 * 60);
        let age = || {
            let folder = fs::File::open(&used.path).unwrap();
            folder.set_modified(eight_days_ago).unwrap();
        };
        age();
        tidy(root.path().to_owned()).await;
        assert!(used.path.exists());
        let path = used.path.clone();
        drop(used);
        tidy(root.path().to_owned()).await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_link_to_another_directory_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), root.path().join(Uuid::nil().to_string())).unwrap();
        assert!(create(root.path(), Uuid::nil()).await.is_err());
    }
}
