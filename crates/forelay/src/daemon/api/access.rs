//! Who may do what over the API: the user at the other end of the socket against the
//! configuration's table.
//!
//! Root may do everything, and so may who has the operator's token over TCP (`token`). Another user acts for the owners that the table gives to it or to one
//! of its groups: it sees and handles their VMs, snapshots, history and forecasts as if there were
//! no others. What tells of the whole host is for those who may act for all owners. What anybody
//! changes is written to the audit log.
//!
//! Refuses to know the routes' meaning beyond whom a request is about; a route that is not known
//! here is closed to all but those. Invariant: of another owner's VM a client learns no more than
//! that its name is taken.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::unix::UCred;

use crate::api::ApiError;
use crate::config::AccessRule;
use crate::daemon::Host;
use crate::daemon::api::audit::Deed;
use crate::daemon::api::server::Failure;
use crate::daemon::error::HostError;
use crate::daemon::order::owner_of;

/// In a rule, every owner.
const EVERY: &str = "*";
/// Largest body of an answer that is looked through for owners.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its user; of whom has the token over TCP none is known.
    pub user: Option<u32>,
    /// Its process, when it connected.
    pub process: Option<i32>,
    owners: Owners,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Owners {
    All,
    These(Arc<BTreeSet<String>>),
}

impl Caller {
    /// The caller with these credentials under the table.
    pub fn new(credentials: &UCred, rules: &[AccessRule]) -> Self {
        let (user, group) = (credentials.uid(), credentials.gid());
        let owners = match user {
            0 => Owners::All,
            _ if rules.is_empty() => Owners::These(Arc::default()),
            _ => {
                let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
                let accounts = Accounts {
                    users: read("/etc/passwd"),
                    groups: read("/etc/group"),
                };
                accounts.owners(rules, user, group)
            }
        };
        Self {
            user: Some(user),
            process: credentials.pid(),
            owners,
        }
    }

    /// Who has the operator's token: it acts for all owners.
    pub fn with_token() -> Self {
        Self {
            user: None,
            process: None,
            owners: Owners::All,
        }
    }

    /// Whether it came over TCP.
    pub fn is_over_tcp(&self) -> bool {
        self.user.is_none()
    }

    fn may_act_for(&self, owner: &str) -> bool {
        match &self.owners {
            Owners::All => true,
            Owners::These(owners) => owners.contains(owner),
        }
    }
}

/// The host's users and groups, as in `/etc`.
struct Accounts {
    users: String,
    groups: String,
}

impl Accounts {
    fn owners(&self, rules: &[AccessRule], user: u32, group: u32) -> Owners {
        let mut owners = BTreeSet::new();
        for rule in rules {
            let is_user = rule
                .user
                .as_ref()
                .is_some_and(|one| self.is_user(one, user));
            let is_group = rule.group.as_ref();
            if is_user || is_group.is_some_and(|one| self.is_in(one, user, group)) {
                owners.extend(rule.owners.iter().cloned());
            }
        }
        match owners.contains(EVERY) {
            true => Owners::All,
            false => Owners::These(Arc::new(owners)),
        }
    }

    /// Whether `wanted`, a name or a number, is this user.
    fn is_user(&self, wanted: &str, user: u32) -> bool {
        wanted.parse() == Ok(user) || number_of(&self.users, wanted) == Some(user)
    }

    /// Whether this user is in the group `wanted`, by its own group or as a member.
    fn is_in(&self, wanted: &str, user: u32, group: u32) -> bool {
        if wanted.parse() == Ok(group) || number_of(&self.groups, wanted) == Some(group) {
            return true;
        }
        let line = self
            .groups
            .lines()
            .find(|line| line.split(':').next() == Some(wanted));
        let members = line
            .and_then(|line| line.split(':').nth(3))
            .unwrap_or_default();
        members
            .split(',')
            .any(|member| number_of(&self.users, member) == Some(user))
    }
}

/// The number in the third field of the line that begins with `name`.
fn number_of(lines: &str, name: &str) -> Option<u32> {
    let mut named = lines
        .lines()
        .filter(|line| line.split(':').next() == Some(name));
    named.next()?.split(':').nth(2)?.parse().ok()
}

/// The number of a group by its name or number.
pub fn group_number(group: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    group.parse().ok().or_else(|| number_of(&groups, group))
}

/// Whom a request is about.
#[derive(Debug, PartialEq, Eq)]
enum About<'a> {
    /// Nobody.
    Nobody,
    /// The owner of a VM.
    Vm(&'a str),
    /// The owner of a snapshot.
    Snapshot(&'a str),
    /// The owner in the manifest that the request has.
    Manifest,
    /// Several owners: the answer is a list.
    List,
    /// The whole host.
    Host,
}

fn about<'a>(method: &Method, path: &'a str) -> About<'a> {
    let mut parts = path.split('/').skip(1);
    if parts.next() != Some("v1") {
        return About::Host;
    }
    let (first, second) = (parts.next().unwrap_or_default(), parts.next());
    let reads = method == Method::GET;
    match (first, second) {
        ("vms", Some(name)) => About::Vm(name),
        ("snapshots", Some(id)) => About::Snapshot(id),
        ("vms" | "snapshots", None) if reads => About::List,
        ("vms" | "snapshots" | "prefetch", None) => About::Manifest,
        ("history" | "forecast", None) if reads => About::List,
        ("health", None) if reads => About::Nobody,
        _ => About::Host,
    }
}

fn refused(status: StatusCode, error: String) -> Response {
    (status, Json(ApiError::new(error))).into_response()
}

/// Lets a request through if its caller may act for whom it is about, and writes down what it
/// changed or tried to.
pub async fn check(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = match permit(&host, &caller, request).await {
        Ok((request, about_list)) => {
            let answer = next.run(request).await;
            match about_list {
                true => only_theirs(&caller, answer).await,
                false => answer,
            }
        }
        Err(refusal) => refusal,
    };
    if method != Method::GET {
        host.audit.note(Deed {
            user: caller.user,
            process: caller.process,
            method: method.as_str().to_owned(),
            path,
            status: answer.status().as_u16(),
        });
    }
    answer
}

/// The request, and whether its answer is a list of what is of several owners.
async fn permit(
    host: &Host,
    caller: &Caller,
    request: Request,
) -> Result<(Request, bool), Response> {
    if caller.owners == Owners::All {
        return Ok((request, false));
    }
    let path = request.uri().path().to_owned();
    let other = |error: HostError| Failure::from(error).into_response();
    match about(request.method(), &path) {
        About::Nobody => Ok((request, false)),
        About::List => Ok((request, true)),
        About::Vm(name) => {
            let owner = host
                .vms
                .instance(name)
                .map(|instance| instance.profile().owner);
            match owner {
                Ok(owner) if caller.may_act_for(&owner) => Ok((request, false)),
                _ => Err(other(HostError::NoSuchVm(name.to_owned()))),
            }
        }
        About::Snapshot(id) => {
            let (_, kept) = host.snapshots.named(id).await.map_err(other)?;
            match caller.may_act_for(kept.domain.as_str()) {
                true => Ok((request, false)),
                false => Err(other(HostError::Invalid(format!(
                    "there is no snapshot {id}"
                )))),
            }
        }
        About::Manifest => {
            let (parts, body) = request.into_parts();
            let bytes = axum::body::to_bytes(body, MAX_ANSWER_BYTES).await;
            let bytes = bytes.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE.into_response())?;
            let owner = manifests_owner(&bytes);
            // What is no request of ours is told so by the route.
            if let Some(owner) = owner.filter(|owner| !caller.may_act_for(owner)) {
                return Err(refused(
                    StatusCode::FORBIDDEN,
                    format!(
                        "you may not act for owner {owner}: ask for an [[access]] entry in the \
                         daemon's configuration"
                    ),
                ));
            }
            Ok((Request::from_parts(parts, Body::from(bytes)), false))
        }
        About::Host => Err(refused(
            StatusCode::FORBIDDEN,
            "this tells of or changes the whole host: only root and who may act for all owners \
             (`*`) may ask"
                .to_owned(),
        )),
    }
}

/// Whom the manifest in a request is for; `None` if there is none that can be understood.
fn manifests_owner(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct WithManifest {
        manifest: String,
    }
    let request: WithManifest = serde_json::from_slice(body).ok()?;
    let manifest = forelay_image::manifest::Manifest::parse(&request.manifest).ok()?;
    Some(owner_of(&manifest))
}

/// A list without what is of owners that the caller may not act for.
async fn only_theirs(caller: &Caller, answer: Response) -> Response {
    let (mut parts, body) = answer.into_parts();
    if !parts.status.is_success() {
        return Response::from_parts(parts, body);
    }
    let bytes = axum::body::to_bytes(body, MAX_ANSWER_BYTES)
        .await
        .unwrap_or_default();
    let Ok(Value::Array(mut list)) = serde_json::from_slice(&bytes) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    list.retain(|one| {
        let owner = one.get("owner").or_else(|| one.get("domain"));
        let owner = owner.and_then(Value::as_str);
        owner.is_some_and(|owner| caller.may_act_for(owner))
    });
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(Value::Array(list).to_string()))
}

/// Lets a group reach the API's socket: it may enter the socket's directory and no more.
pub fn open_to_group(socket: &Path, group: &str) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let number = group_number(group).ok_or_else(|| {
        std::io::Error::other(format!(
            "there is no group {group}: make it, or mend `group`"
        ))
    })?;
    std::os::unix::fs::lchown(socket, None, Some(number))?;
    if let Some(dir) = socket.parent() {
        std::os::unix::fs::lchown(dir, None, Some(number))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o710))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(user: Option<&str>, group: Option<&str>, owners: &[&str]) -> AccessRule {
        AccessRule {
            user: user.map(str::to_owned),
            group: group.map(str::to_owned),
            owners: owners.iter().map(|one| (*one).to_owned()).collect(),
        }
    }

    #[test]
    fn a_user_acts_for_the_owners_of_its_rules_and_its_groups() {
        let accounts = Accounts {
            users: "root:x:0:0::/:\nann:x:1000:1000::/:\nbob:x:1001:1001::/:\n".to_owned(),
            groups: "ann:x:1000:\nops:x:50:bob,carl\nwheel:x:51:\n".to_owned(),
        };
        let rules = [
            rule(Some("ann"), None, &["a", "shared"]),
            rule(None, Some("ops"), &["b", "shared"]),
            rule(None, Some("wheel"), &["*"]),
            rule(Some("1234"), None, &["n"]),
        ];
        let owners = |user, group| accounts.owners(&rules, user, group);
        let these = |names: &[&str]| {
            let names = names.iter().map(|one| (*one).to_owned()).collect();
            Owners::These(Arc::new(names))
        };
        assert_eq!(owners(1000, 1000), these(&["a", "shared"]));
        assert_eq!(owners(1001, 1001), these(&["b", "shared"]), "a member");
        assert_eq!(owners(1002, 50), these(&["b", "shared"]), "its own group");
        assert_eq!(owners(1002, 51), Owners::All);
        assert_eq!(owners(1234, 7), these(&["n"]));
        assert_eq!(owners(1002, 1002), these(&[]));
    }

    #[test]
    fn each_request_is_about_somebody_and_unknown_ones_about_the_host() {
        let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
        let cases = [
            (&get, "/v1/vms", About::List),
            (&post, "/v1/vms", About::Manifest),
            (&post, "/v1/vms/web/exec", About::Vm("web")),
            (&post, "/v1/vms/web/hibernate", About::Vm("web")),
            (&post, "/v1/vms/web/fork", About::Vm("web")),
            (&delete, "/v1/vms/web", About::Vm("web")),
            (&post, "/v1/prefetch", About::Manifest),
            (&get, "/v1/snapshots", About::List),
            (&delete, "/v1/snapshots/ab", About::Snapshot("ab")),
            (&get, "/v1/history", About::List),
            (&get, "/v1/health", About::Nobody),
            (&get, "/v1/memory", About::Host),
            (&get, "/metrics", About::Host),
            (&get, "/v1/events", About::Host),
            (&post, "/v1/memory/drop", About::Host),
            (&post, "/v1/anything/new", About::Host),
            (&get, "//v1/vms", About::Host),
            // Pages show what is of all owners.
            (&get, "/", About::Host),
            (&get, "/ui/vms/web", About::Host),
            (&get, "/ui/launches", About::Host),
        ];
        for (method, path, expected) in cases {
            assert_eq!(about(method, path), expected, "{method} {path}");
        }
    }
}
