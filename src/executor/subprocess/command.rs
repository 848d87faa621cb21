//! Looks up a command's program, as `execvp` would.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// The search path if PATH is not set.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Checks that a command can run on this machine: its working directory exists,
/// and its program is found and executable. `path` is the command's PATH.
///
/// # Errors
/// The reason, with the program or the directory.
pub fn check_command(
    command: &[String],
    cwd: Option<&Path>,
    path: Option<&OsStr>,
) -> Result<(), String> {
    find_program(command, cwd, path).map(|_| ())
}

/// The program's absolute path.
pub(super) fn find_program(
    command: &[String],
    cwd: Option<&Path>,
    path: Option<&OsStr>,
) -> Result<PathBuf, String> {
    let Some(name) = command.first().filter(|name| !name.is_empty()) else {
        return Err("its command is empty".to_owned());
    };
    if let Some(cwd) = cwd.filter(|cwd| !cwd.is_dir()) {
        return Err(format!(
            "its working directory {} does not exist or is not a directory",
            cwd.display()
        ));
    }
    if name.contains('/') {
        let program = cwd.unwrap_or(Path::new("")).join(name);
        let program = std::path::absolute(&program).unwrap_or(program);
        return match can_run(&program) {
            Ok(()) => Ok(program),
            Err(reason) => Err(format!("its program {} {reason}", program.display())),
        };
    }
    let path = path.unwrap_or(OsStr::new(DEFAULT_PATH));
    let mut reason = format!("is not in PATH ({})", path.display());
    for folder in std::env::split_paths(path) {
        // Relative entries are relative to the command's working directory.
        let candidate = cwd.unwrap_or(Path::new("")).join(folder).join(name);
        let candidate = std::path::absolute(&candidate).unwrap_or(candidate);
        match can_run(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(why) if candidate.exists() => {
                reason = format!("{why} ({})", candidate.display());
            }
            Err(_) => {}
        }
    }
    Err(format!("its program `{name}` {reason}"))
}

fn can_run(program: &Path) -> Result<(), String> {
    match program.metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err("does not exist".to_owned())
        }
        Err(error) => Err(format!("cannot be read: {error}")),
        Ok(metadata) if !metadata.is_file() => Err("is not a file".to_owned()),
        Ok(_) => access(program, Access::EXEC_OK).map_err(|_| "is not executable".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn command(program: &str) -> Vec<String> {
        vec![program.to_owned()]
    }

    fn write_program(path: &Path, mode: u32) {
        fs::write(path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_program_is_found_where_the_command_would_find_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        let program = folder.path().join("bin/train");
        write_program(&program, 0o755);
        let cwd = Some(folder.path());
        let path = format!("/nonexistent:{}/bin", folder.path().display());

        let by_path = find_program(&command("train"), None, Some(OsStr::new(&path)));
        assert_eq!(by_path.as_deref(), Ok(program.as_path()));
        let by_cwd = find_program(&command("bin/train"), cwd, None);
        assert_eq!(by_cwd.as_deref(), Ok(program.as_path()));
        let relative_path = find_program(&command("train"), cwd, Some(OsStr::new("bin")));
        assert_eq!(relative_path.as_deref(), Ok(program.as_path()));
        assert!(check_command(&command("sh"), None, None).is_ok());
    }

    #[test]
    fn what_cannot_be_run_is_named_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        write_program(&folder.path().join("data"), 0o644);
        let path = folder.path().as_os_str();
        let check = |name: &str| check_command(&command(name), None, Some(path)).unwrap_err();

        assert!(check("no-such-program").contains("`no-such-program` is not in PATH"));
        assert!(check("data").contains("`data` is not executable"));
        assert!(check("/no/such/program").contains("/no/such/program does not exist"));
        assert!(check("/etc").contains("is not a file"));
        let nowhere = check_command(&command("sh"), Some(Path::new("/no/folder")), None);
        assert!(nowhere.unwrap_err().contains("/no/folder"));
        assert!(check_command(&[], None, None).is_err());
    }
}
