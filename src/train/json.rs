//! JSON in which a key stands once. Of one that stands twice serde_json keeps the last, and drops samples or settings without a
//! word.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

pub fn parse(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).map(|Once(value)| value)
}

struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Once, D::Error> {
        deserializer.deserialize_any(Walk).map(Once)
    }
}

struct Walk;

impl<'de> Visitor<'de> for Walk {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Once(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("key '{key}' is there twice")));
            }
            let Once(value) = map.next_value()?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_everything_once_is_read_as_serde_json_reads_it() {
        for text in [
            r#"{"b": [1, -2, 0.5, 1e300, 18446744073709551615, true, false, null], "a": {"a": "é\n", "": {}}, "c": []}"#,
            " \"text\" ",
            "3",
        ] {
            let value = parse(text).unwrap();
            assert_eq!(value, serde_json::from_str::<Value>(text).unwrap());
            // The order of keys too, which templates show.
            assert_eq!(value.to_string(), serde_json::from_str::<Value>(text).unwrap().to_string());
        }
        assert!(parse(&"[".repeat(100_000)).unwrap_err().to_string().contains("recursion"));
        assert!(parse("1 2").unwrap_err().is_syntax());
    }

    #[test]
    fn a_key_that_is_there_twice_is_named_with_its_place() {
        for text in ["{\"a\": 1,\n \"a\": 1}", "[{\"b\": {}},\n {\"a\": [], \"b\": {\"a\": 1, \"a\": 2}}]"] {
            let error = parse(text).unwrap_err();
            assert!(error.is_data() && error.line() == 2, "{error}");
            assert!(error.to_string().starts_with("key 'a' is there twice"), "{error}");
        }
    }
}
