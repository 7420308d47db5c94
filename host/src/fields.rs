//! The fields of a JSON object, with errors that name file and field.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Beyond any model; keeps products of sizes within a usize.
const MAX_SIZE: usize = 1 << 24;

/// A field's value, as tables name it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Plain {
    Text(&'static str),
    Flag(bool),
    Number(f64),
}

/// The fields of a JSON object. It remembers which of them were read.
pub(crate) struct Fields {
    path: PathBuf,
    /// What stands before a field's name in errors, where the object lies within another.
    within: String,
    fields: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl Fields {
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let fields = serde_json::from_slice(text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), within: String::new(), fields, read: RefCell::default() })
    }

    /// The fields of an object within this one, if there is one.
    pub fn nested(&self, field: &str) -> Result<Option<Self>> {
        let object = self.get(field, "an object", Value::as_object)?;
        Ok(object.map(|fields| Self {
            path: self.path.clone(),
            within: format!("{}{field}.", self.within),
            fields: fields.clone(),
            read: RefCell::default(),
        }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn error(&self, field: &str, problem: String) -> Error {
        Error::Field { path: self.path.clone(), field: format!("{}{field}", self.within), problem }
    }

    /// A field's value, which may be null.
    fn value(&self, field: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(field.to_owned());
        self.fields.get(field)
    }

    /// Whether a field is there and not null.
    pub fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|value| !value.is_null())
    }

    /// Whether a field is there and null, which is something else than a default.
    pub fn is_null(&self, field: &str) -> bool {
        self.value(field).is_some_and(Value::is_null)
    }

    /// A field converted, or none where it is absent or null.
    fn get<'a, T>(&'a self, field: &str, what: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.value(field).filter(|value| !value.is_null()) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(field, format!("is {value}; it must be {what}")))
    }

    /// What a field is where it is absent; null stands for nothing where a value is needed.
    pub fn or_default<T>(&self, field: &str, value: Option<T>, default: Option<T>) -> Result<T> {
        match (value, default) {
            (Some(value), _) => Ok(value),
            (None, Some(_)) if self.is_null(field) => Err(self.error(field, "is null; it must have a value".into())),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.error(field, "is missing".into())),
        }
    }

    pub fn size(&self, field: &str, default: Option<usize>) -> Result<usize> {
        self.or_default(field, self.find_size(field)?, default)
    }

    pub fn find_size(&self, field: &str) -> Result<Option<usize>> {
        self.get(field, &format!("a whole number, at most {MAX_SIZE}"), as_size)
    }

    /// A size of every layer: a number, or a list in which all numbers are the same.
    pub fn size_of_layers(&self, field: &str, default: Option<usize>) -> Result<usize> {
        let uniform = |value: &Value| match value.as_array() {
            Some(list) => {
                let first = list.first().and_then(as_size)?;
                list.iter().all(|value| as_size(value) == Some(first)).then_some(first)
            }
            None => as_size(value),
        };
        self.or_default(field, self.get(field, "a whole number, the same for every layer", uniform)?, default)
    }

    /// A size that cannot be 0.
    pub fn positive(&self, field: &str) -> Result<usize> {
        match self.size(field, None)? {
            0 => Err(self.error(field, "is 0; it must be at least 1".into())),
            size => Ok(size),
        }
    }

    pub fn sizes(&self, field: &str) -> Result<Option<Vec<usize>>> {
        let sizes = |value: &Value| value.as_array()?.iter().map(as_size).collect();
        self.get(field, "a list of whole numbers", sizes)
    }

    /// A whole number that may be below 0.
    pub fn integer(&self, field: &str, default: i64) -> Result<i64> {
        self.or_default(field, self.get(field, "a whole number", Value::as_i64)?, Some(default))
    }

    pub fn number(&self, field: &str, default: Option<f32>) -> Result<f32> {
        let number = self.or_default(field, self.find_number(field)?, default)?;
        match number.is_finite() {
            true => Ok(number),
            false => Err(self.error(field, format!("is {number}; it must be finite"))),
        }
    }

    pub fn find_number(&self, field: &str) -> Result<Option<f32>> {
        Ok(self.get(field, "a number", Value::as_f64)?.map(|number| number as f32))
    }

    /// True or false; null is false, as it is for Python.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        let value = self.get(field, "true or false", Value::as_bool)?;
        Ok(value.unwrap_or(default && !self.is_null(field)))
    }

    pub fn text(&self, field: &str) -> Result<&str> {
        self.or_default(field, self.get(field, "a string", Value::as_str)?, None)
    }

    pub fn find_text(&self, field: &str) -> Result<Option<&str>> {
        self.get(field, "a string", Value::as_str)
    }

    pub fn texts(&self, field: &str) -> Result<Option<Vec<&str>>> {
        self.get(field, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// An object field.
    pub fn object(&self, field: &str) -> Result<&Map<String, Value>> {
        self.or_default(field, self.get(field, "an object", Value::as_object)?, None)
    }

    /// Refuses a field that nobody has read, that is there, and that has none of these values.
    pub fn unread_is(&self, field: &str, allowed: &[Plain]) -> Result<()> {
        if self.read.borrow().contains(field) {
            return Ok(());
        }
        self.is(field, allowed)
    }

    /// Refuses a field that is there and has none of these values.
    pub fn is(&self, field: &str, allowed: &[Plain]) -> Result<()> {
        let Some(value) = self.value(field).filter(|value| !value.is_null()) else { return Ok(()) };
        if allowed.iter().any(|plain| plain.is(value)) {
            return Ok(());
        }
        let only = match allowed {
            [] => "this model family has no such setting".to_owned(),
            _ => {
                let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                format!("only {} is supported", allowed.join(" or "))
            }
        };
        Err(self.error(field, format!("is {value}; {only}")))
    }
}

impl Plain {
    fn is(self, value: &Value) -> bool {
        match self {
            Self::Text(text) => value.as_str() == Some(text),
            Self::Flag(flag) => value.as_bool() == Some(flag),
            Self::Number(number) => value.as_f64() == Some(number),
        }
    }
}

impl std::fmt::Display for Plain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().map(|size| size as usize).filter(|&size| size <= MAX_SIZE)
}
