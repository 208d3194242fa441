//! Who may use the API over loopback TCP: those who know the token, for what they are shown by
//! a browser or ask by a program.
//!
//! The token is an operator's: who has it acts for all owners, as root does on the socket.
//!
//! Every program of the host reaches loopback, so do guests that are let (`host_loopback`), and
//! so does every page that a browser has open. A browser gives the cookies of a host name to
//! every port of it, so also to one that leads into a VM, and pages can have it go there; that is
//! why sessions are for a name of loopback that nobody can guess
//! ([`dashboard_name`](crate::api::dashboard_name)). Invariants: nothing is answered without the
//! token, or the session that a browser has for it, which only reads; both are compared in
//! constant time; a request whose `Host` is no name of loopback is refused, so that no page
//! elsewhere can have its own name point here, and so is one that another origin's page makes;
//! what is answered is never run as code by a browser, unless its page says so.

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, COOKIE, HOST, LOCATION, ORIGIN,
    REFERRER_POLICY, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use forelay_image::Digest;
use subtle::ConstantTimeEq as _;

use crate::api::dashboard_name;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 32;
/// Names of loopback by which programs may ask.
const NAMES: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];
/// What is no page shows nothing and runs nothing.
const NO_PAGE: &str = "default-src 'none'; frame-ancestors 'none'";
/// The cookie that a browser has.
const SESSION: &str = "forelay-session";

/// What lets a client in.
#[derive(Clone)]
pub struct TokenGate(Arc<Secrets>);

struct Secrets {
    token: String,
    /// The host name that browsers know this by.
    name: String,
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
        let session = Digest::of(format!("session of {token}").as_bytes()).hex();
        let name = dashboard_name(&token);
        Self(Arc::new(Secrets {
            token,
            name,
            session,
        }))
    }

    /// Lets a request through, or says why not.
    pub async fn guard(State(gate): State<Self>, request: Request, next: Next) -> Response {
        let mut answer = match gate.instead(&request) {
            None => next.run(request).await,
            Some(answer) => answer,
        };
        let policies = [
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (CONTENT_SECURITY_POLICY, NO_PAGE),
        ];
        for (name, policy) in policies {
            let policy = HeaderValue::from_static(policy);
            answer.headers_mut().entry(name).or_insert(policy);
        }
        answer
    }

    /// What is answered to a request that is not let through.
    fn instead(&self, request: &Request) -> Option<Response> {
        let (headers, uri) = (request.headers(), request.uri());
        let refused = |status: StatusCode, words: &'static str| (status, words).into_response();
        let Some(host) = host(headers, uri).filter(|host| self.goes_by(host)) else {
            let words = "this is served under names of loopback alone: the one that \
                         `forelay dashboard` prints, localhost, 127.0.0.1 or [::1]";
            return Some(refused(StatusCode::MISDIRECTED_REQUEST, words));
        };
        let own = format!("http://{host}");
        if headers
            .get_all(ORIGIN)
            .iter()
            .any(|origin| origin.as_bytes() != own.as_bytes())
        {
            let words = "this is not for pages that come from elsewhere";
            return Some(refused(StatusCode::FORBIDDEN, words));
        }
        let secrets = &*self.0;
        if bearer(headers).is_some_and(|token| same(token, &secrets.token)) {
            return None;
        }
        let reads = [Method::GET, Method::HEAD].contains(request.method());
        let named = without_port(host) == secrets.name;
        let cookie = cookie(headers).filter(|_| named);
        let mut sessions = bearer(headers).into_iter().chain(cookie);
        if reads && sessions.any(|session| same(session, &secrets.session)) {
            return None;
        }
        let asked = uri.query().unwrap_or_default().split('&');
        let mut asked = asked.filter_map(|pair| pair.strip_prefix("token="));
        let asked = asked.next_back().filter(|_| reads && named);
        if asked.is_some_and(|token| same(token, &secrets.token)) {
            return Some(self.let_in(uri));
        }
        let words = "no token, or a wrong one: open the address that `forelay dashboard` prints; \
                     programs send `Authorization: Bearer TOKEN`";
        Some(refused(StatusCode::UNAUTHORIZED, words))
    }

    /// Whether this is known by the name in a `Host`, whatever port it has.
    fn goes_by(&self, host: &str) -> bool {
        let name = without_port(host);
        name == self.0.name || NAMES.contains(&name)
    }

    /// Gives a browser its session, and has it forget the token.
    fn let_in(&self, uri: &Uri) -> Response {
        let cookie = format!(
            "{SESSION}={}; HttpOnly; SameSite=Strict; Path=/",
            self.0.session
        );
        // A path that does not begin like ours may name another host.
        let location = match uri.path().starts_with("/ui/") {
            true => uri.path(),
            false => "/",
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

/// The `Host` of a request, if there is one.
fn host<'a>(headers: &'a HeaderMap, uri: &Uri) -> Option<&'a str> {
    // A target with a name of its own would count instead of the header.
    if uri.host().is_some() {
        return None;
    }
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok(),
        _ => None,
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
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

    fn request(method: &Method, target: &str, headers: &[(&str, &str)]) -> Request {
        let request = Request::builder().method(method).uri(target);
        let request = headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, *value)
        });
        request.body(axum::body::Body::empty()).unwrap()
    }

    #[test]
    fn only_names_of_loopback_are_served() {
        let gate = TokenGate::of("7".repeat(64));
        let is = |target: &str, host: &str| {
            let bearer = format!("Bearer {}", gate.0.token);
            let headers = [("host", host), ("authorization", &bearer)];
            gate.instead(&request(&Method::POST, target, &headers))
                .is_none()
        };
        let named = format!("{}:8900", gate.0.name);
        for fine in [&named, "127.0.0.1:8900", "localhost", "[::1]:80", "[::1]"] {
            assert!(is("/", fine), "{fine}");
        }
        for other in [
            "evil.example",
            "evil.example:8900",
            "forelay.localhost:8900",
            "localhost.evil.example",
            "127.0.0.1.x:1",
            "127.0.0.2:8900",
            "192.0.2.1",
            "[::2]:8900",
            "",
        ] {
            assert!(!is("/", other), "{other}");
        }
        assert!(!is("http://evil.example/", "localhost"));
        let (method, bearer) = (Method::GET, format!("Bearer {}", gate.0.token));
        let without = request(&method, "/", &[("authorization", &bearer)]);
        assert!(gate.instead(&without).is_some());
    }

    #[test]
    fn a_session_is_for_one_name_and_for_pages_of_its_own() {
        let gate = TokenGate::of("7".repeat(64));
        let Secrets {
            token,
            name,
            session,
        } = &*gate.0;
        let host = format!("{name}:8900");
        let cookie = format!("a=b; {SESSION}={session}");
        let asks = |method: &Method, target: &str, headers: &[(&str, &str)]| {
            let instead = gate.instead(&request(method, target, headers));
            instead.map_or(200, |answer| answer.status().as_u16())
        };
        let with_token = format!("/?token={token}");
        let own = format!("http://{host}");
        let get = |headers: &[(&str, &str)]| asks(&Method::GET, "/", headers);
        assert_eq!(get(&[("host", &host), ("cookie", &cookie)]), 200);
        assert_eq!(get(&[("host", "localhost:8900"), ("cookie", &cookie)]), 401);
        let from = |origin: &str| {
            let headers = [("host", &*host), ("cookie", &cookie), ("origin", origin)];
            get(&headers)
        };
        assert_eq!(from(&own), 200);
        for origin in ["null", "http://evil.example", &own.replace("8900", "8080")] {
            assert_eq!(from(origin), 403, "{origin}");
        }
        let headers = [("host", &*host), ("cookie", &cookie)];
        assert_eq!(asks(&Method::POST, "/", &headers), 401);
        assert_eq!(asks(&Method::GET, &with_token, &[("host", &host)]), 303);
        for (method, host) in [(Method::POST, &*host), (Method::GET, "127.0.0.1:8900")] {
            assert_eq!(asks(&method, &with_token, &[("host", host)]), 401, "{host}");
        }
    }
}
