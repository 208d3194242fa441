//! Who is spoken to: certificates that are valid, expired, or signed by nobody who is known.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forelay_remote::RemoteError;
use forelay_remote::wire::{Wire, WireOptions};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

fn pem(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    dir.join("tests/certificates").join(format!("{name}.pem"))
}

/// A server with this certificate, for as long as the runtime lives; its port.
async fn server(certificate: &str) -> u16 {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let chain = vec![CertificateDer::from_pem_file(pem(certificate)).unwrap()];
    let key = PrivateKeyDer::from_pem_file(pem("key")).unwrap();
    let config = ServerConfig::builder().with_no_client_auth();
    let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(chain, key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            // A client that does not like the certificate goes away.
            let Ok(mut client) = acceptor.accept(client).await else {
                continue;
            };
            let mut request = [0; 4096];
            let _ = client.read(&mut request).await;
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nhere";
            let _ = client.write_all(answer).await;
            let _ = client.shutdown().await;
        }
    });
    port
}

async fn asked(port: u16, ca: Option<&str>) -> Result<Vec<u8>, RemoteError> {
    let options = WireOptions {
        plain_http: false,
        ca: ca.map(pem),
        silence: Duration::from_secs(60),
        hint: "",
    };
    let wire = Wire::new("the server", &options)?;
    let request = wire.client().get(format!("https://127.0.0.1:{port}/"));
    let answer = wire.send(request.build().unwrap()).await?;
    let body = wire.body(answer, 4).await?;
    Ok(body.to_vec())
}

#[tokio::test]
async fn a_certificate_counts_while_it_is_valid_and_its_signer_is_known() {
    let valid = server("valid").await;
    assert_eq!(asked(valid, Some("authority")).await.unwrap(), b"here");
    let expired = server("expired").await;
    for (port, ca, because) in [
        (expired, Some("authority"), "xpired"),
        (valid, None, "ssuer"),
    ] {
        let error = asked(port, ca).await.unwrap_err();
        assert!(matches!(error, RemoteError::Certificate { .. }), "{error}");
        assert!(!error.is_transient());
        let line = error.to_string();
        assert!(
            line.contains(because) && line.contains("the server"),
            "{line}"
        );
    }
    let missing = asked(valid, Some("no-such-file")).await.unwrap_err();
    assert!(matches!(missing, RemoteError::Local(_)), "{missing}");
}
