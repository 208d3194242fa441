//! Who may use the API over loopback TCP: those who know the token, for what they are shown by
//! a browser or ask by a program.
//!
//! The token is an operator's: who has it acts for all owners, as root does on the socket.
//!
//! Every program of the host reaches loopback, so do guests that are let (`host_loopback`), and
//! so does every page that a browser has open. A browser gives the cookies of a host name to
//! every port of it, so also to a VM's that is forwarded; that is why the address told has a name
//! that nothing else goes by ([`NAME`]). Invariants: nothing is answered without the token, or the session that a
//! browser has for it, which only reads; both are compared in constant time; a request whose
//! `Host` is no name of loopback is refused, so that no page elsewhere can have its own name
//! point here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, COOKIE, HOST, LOCATION, REFERRER_POLICY, SET_COOKIE,
};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use forelay_image::Digest;
use subtle::ConstantTimeEq as _;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 32;
/// A name of loopback, which browsers know to be one, for the dashboard alone.
pub const NAME: &str = "forelay.localhost";
/// The cookie that a browser has.
const SESSION: &str = "forelay-session";

/// What lets a client in.
#[derive(Clone)]
pub struct TokenGate(Arc<Secrets>);

struct Secrets {
    token: String,
    /// What a browser has for it, and those who only read (Prometheus): it tells nothing of the
    /// token.
    session: String,
}

impl TokenGate {
    /// The token in the file `path`, made if there is none, and in `reading` what only reads;
    /// root alone may read both.
    pub fn open(path: &Path, reading: &Path) -> io::Result<Self> {
        let token = match std::fs::read_to_string(path) {
            Ok(token) if is_token(token.trim()) => token.trim().to_owned(),
            Ok(_) => return Err(io::Error::other("it holds no token: remove it")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let token = random()?;
                write(path, &token)?;
                token
            }
            Err(error) => return Err(error),
        };
        let gate = Self::of(token);
        let session = &gate.0.session;
        if std::fs::read_to_string(reading).ok().as_ref() != Some(session) {
            write(reading, session)?;
        }
        Ok(gate)
    }

    fn of(token: String) -> Self {
        let session = Digest::of(format!("session of {token}").as_bytes()).to_string();
        Self(Arc::new(Secrets { token, session }))
    }

    /// Lets a request through, or says why not.
    pub async fn guard(State(gate): State<Self>, request: Request, next: Next) -> Response {
        let headers = request.headers();
        if !is_loopback(headers, request.uri()) {
            let words = "this is served under names of loopback alone: forelay.localhost, localhost, \
                         127.0.0.1 or [::1]";
            return (StatusCode::MISDIRECTED_REQUEST, words).into_response();
        }
        if bearer(headers).is_some_and(|token| same(token, &gate.0.token)) {
            return next.run(request).await;
        }
        let reads = [Method::GET, Method::HEAD].contains(request.method());
        let mut sessions = bearer(headers).into_iter().chain(cookie(headers));
        if reads && sessions.any(|session| same(session, &gate.0.session)) {
            return next.run(request).await;
        }
        let asked = request.uri().query().unwrap_or_default().split('&');
        let mut asked = asked.filter_map(|pair| pair.strip_prefix("token="));
        if reads
            && asked
                .next_back()
                .is_some_and(|token| same(token, &gate.0.token))
        {
            return gate.let_in(request.uri());
        }
        let words = "no token, or a wrong one: open the address that `forelay dashboard` prints; \
                     programs send `Authorization: Bearer TOKEN`";
        (StatusCode::UNAUTHORIZED, words).into_response()
    }

    /// Gives a browser its session, and has it forget the token.
    fn let_in(&self, uri: &Uri) -> Response {
        let cookie = format!(
            "{SESSION}={}; HttpOnly; SameSite=Strict; Path=/",
            self.0.session
        );
        // What begins with two slashes names another host.
        let location = match uri.path().starts_with("//") {
            true => "/",
            false => uri.path(),
        };
        let headers = [
            (SET_COOKIE, cookie),
            (LOCATION, location.to_owned()),
            (CACHE_CONTROL, "no-store".to_owned()),
            (REFERRER_POLICY, "no-referrer".to_owned()),
        ];
        (StatusCode::SEE_OTHER, headers).into_response()
    }
}

/// Where browsers find what is served on this address.
pub fn dashboard_url(address: SocketAddr) -> String {
    // Browsers look for that name at these two.
    let usual = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    ];
    match usual.contains(&address.ip()) {
        true => format!("http://{NAME}:{}/", address.port()),
        false => format!("http://{address}/"),
    }
}

fn is_token(text: &str) -> bool {
    text.len() == 2 * TOKEN_BYTES && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn random() -> io::Result<String> {
    let mut bytes = [0; TOKEN_BYTES];
    let mut filled = 0;
    while filled < TOKEN_BYTES {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a file that appears whole, for root alone.
fn write(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write as _;
    let unfinished = path.with_extension("new");
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = std::fs::File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&unfinished, path)
}

fn same(given: &str, known: &str) -> bool {
    given.as_bytes().ct_eq(known.as_bytes()).into()
}

/// Whether the request is to a name of loopback, on whatever port.
fn is_loopback(headers: &HeaderMap, uri: &Uri) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let host = host.to_str().unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let address = bare.unwrap_or(name).parse::<IpAddr>();
    let known = [NAME, "localhost"].contains(&name) || address.is_ok_and(|one| one.is_loopback());
    // A target with a name of its own would count instead of the header.
    uri.host().is_none() && known
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers
        .get(AUTHORIZATION)?
        .to_str()
        .ok()?
        .strip_prefix("Bearer ")
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|cookies| cookies.split(';'));
    pairs.find_map(|pair| pair.trim().strip_prefix(SESSION)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_token_is_made_once_and_for_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api-token");
        let reading = dir.path().join("api-read-token");
        let gate = TokenGate::open(&path, &reading).unwrap();
        for file in [&path, &reading] {
            let mode = std::fs::metadata(file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert_eq!(std::fs::read_to_string(&reading).unwrap(), gate.0.session);
        assert!(is_token(&gate.0.token) && !gate.0.session.contains(&gate.0.token));
        assert_eq!(
            TokenGate::open(&path, &reading).unwrap().0.token,
            gate.0.token
        );
        std::fs::write(&path, "short").unwrap();
        assert!(TokenGate::open(&path, &reading).is_err());
    }

    #[test]
    fn only_names_of_loopback_are_served() {
        let is = |host: &str, target: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_str(host).unwrap());
            is_loopback(&headers, &target.parse().unwrap())
        };
        for fine in [
            "127.0.0.1:8900",
            "127.0.0.5",
            "localhost",
            "[::1]:80",
            "[::1]",
            "forelay.localhost:8900",
        ] {
            assert!(is(fine, "/"), "{fine}");
        }
        for other in [
            "evil.example",
            "evil.example:8900",
            "localhost.evil.example",
            "127.0.0.1.x:1",
            "192.0.2.1",
            "[::2]:8900",
            "",
        ] {
            assert!(!is(other, "/"), "{other}");
        }
        assert!(!is("localhost", "http://evil.example/"));
        assert!(!is_loopback(&HeaderMap::new(), &"/".parse().unwrap()));
    }
}
