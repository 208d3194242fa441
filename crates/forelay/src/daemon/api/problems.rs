//! Errors as every client sees them: problem details (RFC 9457), each with its request's id.
//!
//! Owns the form. Those who answer with an error say it in words, as JSON or plain text, and may
//! say of which kind it is ([`ProblemKind`]); here it becomes `application/problem+json`. Invariants:
//! every answer has an `x-request-id`; no error is told in another form.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::api::ApiError;

/// The header with a request's id, given by the client or by us.
const REQUEST_ID: &str = "x-request-id";
/// Longest id that a client may give.
const MAX_ID_BYTES: usize = 64;
/// Longest text of an error.
const MAX_TEXT_BYTES: usize = 64 << 10;

/// What an error is about, among an answer's extensions.
#[derive(Clone, Copy, Debug)]
pub struct ProblemKind(pub &'static str);

/// Gives a request its id, and an error its form.
pub async fn answer(request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let status = response.status();
    let mut response = if status.is_client_error() || status.is_server_error() {
        let response = problem(response, &id).await;
        if status.is_server_error() {
            tracing::warn!(id, path, %status, "a request failed");
        }
        response
    } else {
        response
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// The client's id if it is a plain word, else one of our own.
fn request_id(headers: &HeaderMap) -> String {
    /// Tells the requests of this process from those of the one before.
    static PROCESS: LazyLock<u64> = LazyLock::new(|| {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        since.as_millis() as u64
    });
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let given = given.filter(|id| (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(plain));
    given.map_or_else(
        || format!("{:x}-{}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed)),
        str::to_owned,
    )
}

async fn problem(response: Response, id: &str) -> Response {
    let (mut parts, body) = response.into_parts();
    let body = to_bytes(body, MAX_TEXT_BYTES).await.unwrap_or_default();
    let title = parts.status.canonical_reason().unwrap_or("error");
    let text = match serde_json::from_slice::<ApiError>(&body) {
        Ok(said) => said.error,
        Err(_) if body.is_empty() => title.to_lowercase(),
        Err(_) => String::from_utf8_lossy(&body).into_owned(),
    };
    let kind = match parts.extensions.get::<ProblemKind>() {
        Some(ProblemKind(kind)) => kind,
        None => usual_kind(parts.status),
    };
    let problem = ApiError {
        kind: format!("urn:forelay:problem:{kind}"),
        title: title.to_owned(),
        status: parts.status.as_u16(),
        detail: text.clone(),
        request_id: id.to_owned(),
        error: text,
    };
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    parts.headers.remove(CONTENT_LENGTH);
    let json = HeaderValue::from_static("application/problem+json");
    parts.headers.insert(CONTENT_TYPE, json);
    (parts, Body::from(body)).into_response()
}

fn usual_kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => "invalid-request",
        StatusCode::UNAUTHORIZED => "no-token",
        StatusCode::FORBIDDEN => "forbidden",
        StatusCode::NOT_FOUND => "no-such-path",
        StatusCode::METHOD_NOT_ALLOWED => "no-such-method",
        StatusCode::PAYLOAD_TOO_LARGE => "too-large",
        StatusCode::REQUEST_TIMEOUT => "too-slow",
        StatusCode::SERVICE_UNAVAILABLE => "too-many",
        _ if status.is_server_error() => "failed",
        _ => "refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_is_a_problem_wherever_it_comes_from() {
        let read = async |response: Response| {
            let response = problem(response, "r-1").await;
            assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
            assert!(!response.headers().contains_key(CONTENT_LENGTH));
            let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()
        };
        let told = read((StatusCode::BAD_REQUEST, "line 3: no such key").into_response()).await;
        assert_eq!(told["type"], "urn:forelay:problem:invalid-request");
        assert_eq!(
            (&told["status"], &told["title"]),
            (&400.into(), &"Bad Request".into())
        );
        assert_eq!(
            (&told["detail"], &told["error"]),
            (&told["error"], &"line 3: no such key".into())
        );
        let mut said = axum::Json(serde_json::json!({ "error": "in use" })).into_response();
        *said.status_mut() = StatusCode::CONFLICT;
        said.extensions_mut().insert(ProblemKind("busy"));
        let told = read(said).await;
        assert_eq!(told["type"], "urn:forelay:problem:busy");
        assert_eq!(
            (&told["detail"], &told["request_id"]),
            (&"in use".into(), &"r-1".into())
        );
        let told = read(StatusCode::REQUEST_TIMEOUT.into_response()).await;
        assert_eq!(told["detail"], "request timeout");
    }

    #[test]
    fn a_clients_id_is_kept_if_it_is_a_word() {
        let given = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(id).unwrap());
            request_id(&headers)
        };
        assert_eq!(given("ci-7.a_B"), "ci-7.a_B");
        for refused in ["", "a b", "<x>", &"x".repeat(MAX_ID_BYTES + 1)] {
            assert_ne!(given(refused), refused);
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
