//! Registries that lie: what they may cost, and what is said of them.

use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;

/// A request as far as it matters here.
struct Asked {
    /// The registry's own address.
    own: String,
    path: String,
    /// Where the part that is asked for begins.
    from: Option<usize>,
}

/// A registry that says this to a request and closes the connection after it; returns its
/// address.
fn registry(
    answer: impl Fn(&Asked, &mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (own, answer) = (address.clone(), Arc::new(answer));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, own) = (stream.unwrap(), own.clone());
            let answer = Arc::clone(&answer);
            thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let first = lines.next().unwrap().unwrap();
                let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
                let mut from = None;
                for line in lines
                    .map_while(Result::ok)
                    .take_while(|line| !line.is_empty())
                {
                    if let Some((_, range)) = line.to_lowercase().split_once("range: bytes=") {
                        from = range.split('-').next().and_then(|from| from.parse().ok());
                    }
                }
                // The client may have seen enough.
                let _ = answer(&Asked { own, path, from }, &mut stream);
            });
        }
    });
    address
}

fn say(to: &mut TcpStream, status: &str, headers: &str, body: &str) -> io::Result<()> {
    let bytes = body.len();
    write!(
        to,
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {bytes}\r\nConnection: close\r\n\r\n{body}"
    )
}

fn pulled(reference: &str, scratch: &Path) -> Result<Imported, ImportError> {
    let options = ImageOptions {
        source: ImageSource::parse(reference).unwrap(),
        plain_http: false,
        ca: None,
    };
    import_image(&options, None, scratch, &|_| {})
}

fn refused(
    answer: impl Fn(&Asked, &mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> String {
    let reference = format!("{}/app:1", registry(answer));
    let scratch = tempfile::tempdir().unwrap();
    let refused = pulled(&reference, scratch.path());
    let left = fs::read_dir(scratch.path()).unwrap().count();
    assert_eq!(left, 0, "nothing is left");
    let said = refused.map(|_| ()).unwrap_err().to_string();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

/// Configuration and manifest of an image of one layer, which says that that has so many bytes.
fn documents(layer: &[u8], bytes: u64) -> (Vec<u8>, String) {
    let config = json!({"architecture": go_name(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(layer)]}});
    let config = serde_json::to_vec(&config).unwrap();
    let manifest = json!({"schemaVersion": 2, "config": {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": Digest::of(&config), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": Digest::of(layer), "size": bytes}]});
    (config, manifest.to_string())
}

/// Serves such an image; its layer has more than it says, without an end.
fn serve(bytes: u64, path: &str, to: &mut TcpStream) -> io::Result<()> {
    let layer = layer(BASE);
    let (config, manifest) = documents(&layer, bytes);
    let digest = |bytes: &[u8]| Digest::of(bytes).to_string();
    match path {
        _ if path.ends_with(&digest(&layer)) => {
            write!(to, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                to.write_all(&[7; 1 << 16])?;
            }
        }
        _ if path.ends_with(&digest(&config)) => {
            say(to, "200 OK", "", std::str::from_utf8(&config).unwrap())
        }
        _ if path.contains("/manifests/") => say(to, "200 OK", "", &manifest),
        _ => say(to, "200 OK", "", "{}"),
    }
}

#[test]
fn a_registry_that_has_no_end_is_cut() {
    let endless = refused(|asked, to| match asked.path.contains("/manifests/") {
        true => {
            write!(to, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                to.write_all(&[b' '; 1 << 16])?;
            }
        }
        false => say(to, "200 OK", "", "{}"),
    });
    assert!(endless.contains("too large to be read"), "{endless}");
    let longer = refused(|asked, to| serve(5000, &asked.path, to));
    assert!(longer.contains("more than the 5000 bytes"), "{longer}");
    let all = refused(|asked, to| serve(99_999_999_999_999, &asked.path, to));
    assert!(all.contains("bytes of layers"), "{all}");
}

#[test]
fn a_token_that_no_header_can_hold_is_told() {
    let said = refused(|asked, to| {
        let own = &asked.own;
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{own}/token\",service=\"x\"\r\n");
        match asked.path.starts_with("/token") {
            true => say(to, "200 OK", "", r#"{"token": "a\nb"}"#),
            false => say(to, "401 Unauthorized", &challenge, "{}"),
        }
    });
    assert!(said.contains("127.0.0.1"), "{said}");
}

#[test]
fn what_is_wrong_is_told_in_a_line() {
    let gone = refused(|asked, to| match asked.path.contains("/manifests/") {
        true => say(to, "404 Not Found", "", "<html>"),
        false => say(to, "200 OK", "", "{}"),
    });
    assert!(gone.contains("no such image or tag"), "{gone}");
    let denied = refused(|asked, to| match asked.path.contains("/manifests/") {
        true => say(
            to,
            "403 Forbidden",
            "",
            r#"{"errors": [{"code": "DENIED"}]}"#,
        ),
        false => say(to, "200 OK", "", "{}"),
    });
    assert!(denied.contains("docker login"), "{denied}");
}

#[test]
fn a_busy_registry_is_asked_again_and_a_blob_goes_on_where_it_was_cut() {
    let layer = layer(BASE);
    let (config, manifest) = documents(&layer, layer.len() as u64);
    let (asked_of_manifest, parts) = (AtomicUsize::new(0), Arc::new(Mutex::new(Vec::new())));
    let (seen, sent, half) = (Arc::clone(&parts), layer.clone(), layer.len() / 2);
    let address = registry(move |asked, to| {
        if asked.path.contains("/manifests/") {
            return match asked_of_manifest.fetch_add(1, SeqCst) {
                0 => say(to, "503 Busy", "", ""),
                1 => say(to, "429 Slow down", "Retry-After: 1\r\n", ""),
                // The connection ends without an answer.
                2 => Ok(()),
                _ => say(to, "200 OK", "", &manifest),
            };
        }
        if asked.path.ends_with(&Digest::of(&config).to_string()) {
            return say(to, "200 OK", "", std::str::from_utf8(&config).unwrap());
        }
        let mut seen = seen.lock().unwrap();
        seen.push(asked.from);
        let from = asked.from.unwrap_or(0);
        let status = if from > 0 { "206 Part" } else { "200 OK" };
        let rest = &sent[from..];
        let bytes = rest.len();
        write!(
            to,
            "HTTP/1.1 {status}\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n"
        )?;
        match seen.len() {
            1 => to.write_all(&rest[..half]),
            _ => to.write_all(rest),
        }
    });
    let scratch = tempfile::tempdir().unwrap();
    let started = std::time::Instant::now();
    let imported = pulled(&format!("{address}/app:1"), scratch.path()).unwrap();
    assert!(
        started.elapsed().as_secs() >= 1,
        "it is left alone as long as it asks"
    );
    assert_eq!(imported.split_off.len(), 1);
    let text = imported.split_off[0].tree.text_of("etc/kept").unwrap();
    assert_eq!(text.as_deref(), Some("kept"));
    assert_eq!(*parts.lock().unwrap(), [None, Some(half)]);
}

#[test]
fn a_manifest_that_is_not_of_the_digest_asked_for_is_refused() {
    let address = registry(|asked, to| {
        let (_, manifest) = documents(&layer(BASE), 10);
        match asked.path.contains("/manifests/") {
            true => say(to, "200 OK", "", &manifest),
            false => say(to, "404 Not Found", "", ""),
        }
    });
    let digest = Digest::of(b"another manifest");
    let scratch = tempfile::tempdir().unwrap();
    let refused = pulled(&format!("{address}/app@{digest}"), scratch.path());
    let said = refused.map(|_| ()).unwrap_err().to_string();
    assert!(
        said.contains("its manifest is not of digest sha256:"),
        "{said}"
    );
}
