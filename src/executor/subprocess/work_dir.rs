//! A job's private directory: kept between its attempts on one machine, gone
//! when it has ended here, and some days later when it has ended elsewhere.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tracing::{info, warn};
use uuid::Uuid;

/// A huge one may take longer, and is removed beside what comes next.
const REMOVAL: Duration = Duration::from_secs(10);

/// A job that has not been touched for so long has ended on another machine.
const OLD: Duration = Duration::from_secs(7 * 24 * 60 * 60);

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
            true => {
                // It is in use again. A network's file system may refuse.
                let _ = fs::File::open(&folder)
                    .and_then(|folder| folder.set_modified(SystemTime::now()));
                Ok(folder)
            }
            false => Err(not_ours(&folder)),
        }
    })
    .await
}

/// Removes it, as far as it lets itself be removed: a job that has ended has
/// ended.
pub(super) async fn remove(folder: PathBuf) {
    let path = folder.display().to_string();
    let removal = blocking(move || remove_all(&folder));
    match tokio::time::timeout(REMOVAL, removal).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(Err(error)) => warn!(%path, %error, "a work directory could not be removed"),
    }
}

fn remove_all(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        // A job may have taken its own rights to what it made.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_up(folder);
            fs::remove_dir_all(folder)
        }
        removed => removed,
    }
}

/// As far as it goes: the removal tells what is in its way.
fn open_up(folder: &Path) {
    let _ = fs::set_permissions(folder, Permissions::from_mode(PRIVATE));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Not that of a symbolic link's target.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// Makes sure that jobs can have their directories there.
///
/// # Errors
/// They cannot.
pub async fn probe(root: &Path) -> io::Result<()> {
    let probe = Uuid::now_v7();
    let folder = create(root, probe).await?;
    blocking(move || fs::remove_dir(folder)).await
}

/// Removes the directories of jobs that nobody has touched for a week.
pub async fn tidy(root: PathBuf) {
    let tidied = blocking(move || {
        for folder in old_ones(&root)? {
            let path = folder.display();
            match remove_all(&folder) {
                Ok(()) => info!(%path, "an old work directory is removed"),
                Err(error) => warn!(%path, %error, "an old work directory could not be removed"),
            }
        }
        Ok(())
    });
    if let Err(error) = tidied.await {
        warn!(%error, "the work directories could not be looked through");
    }
}

fn old_ones(root: &Path) -> io::Result<Vec<PathBuf>> {
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
    Ok(paths.filter(|path| is_old(path, limit)).collect())
}

/// Nothing in it is younger: a folder's own time tells only of what is directly
/// in it.
fn is_old(path: &Path, limit: SystemTime) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return false;
    };
    let inside = metadata.is_dir().then(|| fs::read_dir(path));
    let mut entries = inside.into_iter().flatten().flatten().flatten();
    metadata.modified().is_ok_and(|modified| modified < limit)
        && entries.all(|entry| is_old(&entry.path(), limit))
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
    use std::os::unix::fs::symlink;

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
    async fn one_that_its_job_has_closed_is_removed_all_the_same() {
        let root = tempfile::tempdir().unwrap();
        let folder = create(root.path(), Uuid::nil()).await.unwrap();
        let inner = folder.join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("weights"), "w").unwrap();
        fs::set_permissions(&inner, Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(folder.join("a"), Permissions::from_mode(0o000)).unwrap();
        remove(folder.clone()).await;
        assert!(!folder.exists());
    }

    #[tokio::test]
    async fn only_directories_of_jobs_in_which_nothing_is_young_are_old() {
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
    async fn a_directory_that_somebody_else_could_have_put_there_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), root.path().join(Uuid::nil().to_string())).unwrap();
        assert!(create(root.path(), Uuid::nil()).await.is_err());
    }
}
