//! Bytes inside JSON messages: UTF-8 text as text, anything else as base64.
//!
//! Invariant: encoding then decoding gives the same bytes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes that are usually text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Form<'a> {
    #[serde(borrow)]
    Text(std::borrow::Cow<'a, str>),
    Base64(String),
}

impl Serialize for Payload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => Form::Text(text.into()),
            Err(_) => Form::Base64(STANDARD.encode(&self.0)),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Form::deserialize(deserializer)? {
            Form::Text(text) => Ok(Self(text.into_owned().into_bytes())),
            Form::Base64(text) => STANDARD
                .decode(text)
                .map(Self)
                .map_err(|error| serde::de::Error::custom(format!("not base64: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_text_is_standard_base64() {
        let json = serde_json::to_string(&Payload(b"\xff\xfe\xfd".to_vec())).unwrap();
        assert_eq!(json, r#"{"base64":"//79"}"#);
        let read =
            |text: &str| serde_json::from_value::<Payload>(serde_json::json!({ "base64": text }));
        assert_eq!(read("Zm8=").unwrap().0, b"fo");
        for bad in ["Z", "Zg=", "====", "Z===", "Zg-=", "Z\u{e9}=="] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_bytes_survive_json(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let json = serde_json::to_string(&Payload(bytes.clone())).unwrap();
            prop_assert_eq!(serde_json::from_str::<Payload>(&json).unwrap().0, bytes);
        }

        #[test]
        fn any_text_is_decoded_or_refused(text in ".{0,80}") {
            let _ = serde_json::from_value::<Payload>(serde_json::json!({ "base64": text }));
        }
    }
}
