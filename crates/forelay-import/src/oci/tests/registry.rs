//! Registries that lie: what they may cost, and what is said of them.

use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::thread;

use super::*;

/// What a registry says to a request for a path; it closes the connection after that.
type Answer = fn(&str, &str, &mut TcpStream) -> io::Result<()>;

/// A registry that answers so; returns its address.
fn registry(answer: Answer) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let own = address.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, own) = (stream.unwrap(), own.clone());
            thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let first = lines.next().unwrap().unwrap();
                while lines
                    .next()
                    .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
                {}
                let path = first.split(' ').nth(1).unwrap_or_default();
                // The client may have seen enough.
                let _ = answer(&own, path, &mut stream);
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

fn refused(answer: Answer) -> String {
    let reference = format!("{}/app:1", registry(answer));
    let options = ImageOptions {
        source: ImageSource::parse(&reference).unwrap(),
        plain_http: false,
    };
    let scratch = tempfile::tempdir().unwrap();
    let refused = import_image(&options, scratch.path(), &|_| {});
    let left = fs::read_dir(scratch.path()).unwrap().count();
    assert_eq!(left, 0, "nothing is left");
    let said = refused.map(|_| ()).unwrap_err().to_string();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

/// Serves an image of one layer, of which the manifest says that it has so many bytes.
fn serve(bytes: &str, path: &str, to: &mut TcpStream) -> io::Result<()> {
    let layer = layer(BASE);
    let config = serde_json::to_vec(&json!({"architecture": go_name(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]}}))?;
    let digest = |bytes: &[u8]| Digest::of(bytes).to_string();
    match path {
        _ if path.ends_with(&digest(&layer)) => {
            // More than was said, without an end.
            write!(to, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                to.write_all(&[7; 1 << 16])?;
            }
        }
        _ if path.ends_with(&digest(&config)) => {
            say(to, "200 OK", "", std::str::from_utf8(&config).unwrap())
        }
        _ if path.contains("/manifests/") => {
            let manifest = json!({"schemaVersion": 2, "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config), "size": config.len()},
                "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": digest(&layer), "size": bytes.parse::<u64>().unwrap()}]});
            say(to, "200 OK", "", &manifest.to_string())
        }
        _ => say(to, "200 OK", "", "{}"),
    }
}

#[test]
fn a_registry_that_has_no_end_is_cut() {
    let endless = refused(|_, path, to| match path.contains("/manifests/") {
        true => {
            write!(to, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                to.write_all(&[b' '; 1 << 16])?;
            }
        }
        false => say(to, "200 OK", "", "{}"),
    });
    assert!(endless.contains("too large to be read"), "{endless}");
    let longer = refused(|_, path, to| serve("5000", path, to));
    assert!(longer.contains("longer than the 5000 bytes"), "{longer}");
    let all = refused(|_, path, to| serve("99999999999999", path, to));
    assert!(all.contains("bytes of layers"), "{all}");
}

#[test]
fn a_token_that_no_header_can_hold_is_told() {
    let said = refused(|own, path, to| {
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{own}/token\",service=\"x\"\r\n");
        match path.starts_with("/token") {
            true => say(to, "200 OK", "", r#"{"token": "a\nb"}"#),
            false => say(to, "401 Unauthorized", &challenge, "{}"),
        }
    });
    assert!(said.contains("127.0.0.1"), "{said}");
}

#[test]
fn what_is_wrong_is_told_in_a_line() {
    let gone = refused(|_, path, to| match path.contains("/manifests/") {
        true => say(to, "404 Not Found", "", "<html>"),
        false => say(to, "200 OK", "", "{}"),
    });
    assert!(gone.contains("no such image or tag"), "{gone}");
    let denied = refused(|_, path, to| match path.contains("/manifests/") {
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
