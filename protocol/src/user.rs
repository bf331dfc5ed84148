//! Whom a program runs as: `USER[:GROUP]`, names or numbers, by the contents of passwd(5) and group(5).
//!
//! The host looks into an image's files, the guest into a container's root; both take a text to mean the same. What they look into is hostile.

/// No distribution's files come near; of one that does no names are known.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// As many as Linux lets a process have.
const GROUPS_MAX: usize = 65536;
/// The kernel takes -1 for "unchanged".
const ID_MAX: u32 = u32::MAX - 1;

/// A user as the kernel knows it, and its home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Groups beside the primary one, ascending.
    pub additional_gids: Vec<u32>,
    /// Home directory, `/` if nothing says otherwise.
    pub home: String,
}

/// Why a user cannot be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// There is no such user.
    #[error("the container has no user `{}` in /etc/passwd: give a numeric uid, or a user that it has", .0.escape_debug())]
    UnknownUser(String),
    /// There is no such group.
    #[error("the container has no group `{}` in /etc/group: give a numeric gid, or a group that it has", .0.escape_debug())]
    UnknownGroup(String),
    /// The text has no user before the colon, or no group behind it.
    #[error("`{}` is not a user: write USER or USER:GROUP, names or numbers", .0.escape_debug())]
    Malformed(String),
}

/// Looks up `NAME`, `UID`, `NAME:GROUP` or `UID:GID` in these files; nothing is root.
///
/// A number need not be there; then its group is 0, as docker has it. With a group given, the user's other groups do not count.
///
/// # Errors
///
/// Names what is not there.
pub fn resolve(spec: &str, passwd: &[u8], group_file: &[u8]) -> Result<User, UserError> {
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) if user.is_empty() || group.is_empty() => {
            return Err(UserError::Malformed(format!("{user}:{group}")));
        }
        Some((user, group)) => (user, Some(group)),
        None if spec.is_empty() => ("0", None),
        None => (spec, None),
    };
    let found = lines(passwd).filter_map(Account::parse).find(|account| account.is(user));
    let number = id(user);
    if found.is_none() && number.is_none() {
        return Err(UserError::UnknownUser(user.to_owned()));
    }
    let name = found.as_ref().map(|account| account.name);
    let mut resolved = match &found {
        Some(account) => User { uid: account.uid, gid: account.gid, additional_gids: Vec::new(), home: account.home() },
        None => User { uid: number.unwrap_or_default(), gid: 0, additional_gids: Vec::new(), home: "/".to_owned() },
    };
    let mut all = lines(group_file).filter_map(Group::parse);
    match (group, name) {
        (Some(group), _) => {
            let found = all.find(|known| known.name == group).map(|known| known.gid);
            resolved.gid = found.or_else(|| id(group)).ok_or_else(|| UserError::UnknownGroup(group.to_owned()))?;
        }
        (None, Some(name)) => {
            let mut gids: Vec<u32> = all.filter(|group| group.has(name)).map(|group| group.gid).collect();
            gids.sort_unstable();
            gids.dedup();
            gids.retain(|gid| *gid != resolved.gid);
            gids.truncate(GROUPS_MAX);
            resolved.additional_gids = gids;
        }
        (None, None) => {}
    }
    Ok(resolved)
}

/// A line of `/etc/passwd`.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (id(fields.next()?)?, id(fields.next()?)?);
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }

    fn is(&self, user: &str) -> bool {
        self.name == user || id(user) == Some(self.uid)
    }

    fn home(&self) -> String {
        if self.home.starts_with('/') { self.home.to_owned() } else { "/".to_owned() }
    }
}

/// A line of `/etc/group`.
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        Some(Self { name, gid: id(fields.next()?)?, members: fields.next().unwrap_or_default() })
    }

    fn has(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == user)
    }
}

fn id(text: &str) -> Option<u32> {
    // `parse` would take a sign.
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?.filter(|id| *id <= ID_MAX)
}

/// The lines that are text and no comment.
fn lines(content: &[u8]) -> impl Iterator<Item = &str> {
    let text = content.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    text.map(str::trim).filter(|line| !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"# comment\nroot:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:44:Web:/var/www:/bin/false\n\
        homeless:x:7:7::relative:/bin/sh\n100:x:5:5::/five:\n\xff:x:9:9::/:\n";
    const GROUP: &[u8] = b"root:x:0:\nweb:x:44:\nlog:x:4:web,homeless\nadm:x:3:web\nself:x:44:web\n";

    fn user(uid: u32, gid: u32, additional_gids: &[u32], home: &str) -> User {
        User { uid, gid, additional_gids: additional_gids.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn names_and_numbers() {
        for (spec, expected) in [
            ("", user(0, 0, &[], "/root")),
            ("root", user(0, 0, &[], "/root")),
            ("web", user(33, 44, &[3, 4], "/var/www")),
            ("33", user(33, 44, &[3, 4], "/var/www")),
            ("web:adm", user(33, 3, &[], "/var/www")),
            ("33:99", user(33, 99, &[], "/var/www")),
            ("1000", user(1000, 0, &[], "/")),
            ("1000:1000", user(1000, 1000, &[], "/")),
            ("1000:log", user(1000, 4, &[], "/")),
            ("homeless", user(7, 7, &[4], "/")),
            // A name that looks like a number is a name first.
            ("100", user(5, 5, &[], "/five")),
        ] {
            assert_eq!(resolve(spec, PASSWD, GROUP).unwrap(), expected, "{spec}");
        }
    }

    #[test]
    fn what_is_unknown_is_named() {
        assert!(resolve("nobody", PASSWD, GROUP).unwrap_err().to_string().contains("`nobody`"));
        assert!(resolve("web:nogroup", PASSWD, GROUP).unwrap_err().to_string().contains("`nogroup`"));
        for bad in [":", "web:", ":web"] {
            assert!(matches!(resolve(bad, PASSWD, GROUP), Err(UserError::Malformed(_))), "{bad}");
        }
        for bad in ["4294967295", "-1", "+1", "99999999999"] {
            assert!(matches!(resolve(bad, PASSWD, GROUP), Err(UserError::UnknownUser(_))), "{bad}");
        }
    }

    #[test]
    fn without_files_there_are_numbers_only() {
        assert_eq!(resolve("", b"", b"").unwrap(), user(0, 0, &[], "/"));
        assert!(resolve("root", b"", b"").is_err());
        assert_eq!(resolve("5:6", b"", b"").unwrap(), user(5, 6, &[], "/"));
    }
}
