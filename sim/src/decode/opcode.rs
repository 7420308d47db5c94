//! An opcode taken apart: every modifier must be taken by the decoder, or the instruction is not supported.

use crate::ast::Type;

/// `ld.global.v4.u32` as its parts, each marked once a decoder has understood it.
pub(crate) struct Opcode<'a> {
    parts: Vec<&'a str>,
    used: u64,
}

impl<'a> Opcode<'a> {
    pub fn new(text: &'a str) -> Self {
        Self { parts: text.split('.').take(64).collect(), used: 1 }
    }

    /// The first part.
    pub fn name(&self) -> &'a str {
        self.parts[0]
    }

    /// Whether a modifier is there; marks it as understood.
    pub fn take(&mut self, modifier: &str) -> bool {
        let found = self.position(|part| part == modifier);
        if let Some(index) = found {
            self.used |= 1 << index;
        }
        found.is_some()
    }

    /// The first of `modifiers` that is there; marks it as understood.
    pub fn take_one(&mut self, modifiers: &[&'static str]) -> Option<&'static str> {
        modifiers.iter().copied().find(|modifier| self.take(modifier))
    }

    /// Marks every one of `modifiers` that is there as understood: they do not change what is computed here.
    pub fn ignore(&mut self, modifiers: &[&str]) {
        for modifier in modifiers {
            self.take(modifier);
        }
    }

    /// The next type.
    pub fn take_type(&mut self) -> Option<Type> {
        let index = self.position(|part| Type::from_name(part).is_some())?;
        self.used |= 1 << index;
        Type::from_name(self.parts[index])
    }

    /// The next type, or an error.
    pub fn need_type(&mut self) -> Result<Type, String> {
        self.take_type().ok_or_else(|| "a type is missing".to_owned())
    }

    /// The first part that is not understood yet and for which `parse` has a value.
    pub fn take_map<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let index = self.position(|part| parse(part).is_some())?;
        self.used |= 1 << index;
        parse(self.parts[index])
    }

    fn position(&self, wanted: impl Fn(&str) -> bool) -> Option<usize> {
        (1..self.parts.len()).find(|&index| self.used >> index & 1 == 0 && wanted(self.parts[index]))
    }

    /// An error if a modifier was left over.
    pub fn finish(&self) -> Result<(), String> {
        match self.position(|_| true) {
            Some(index) => Err(format!("modifier `.{}` is not known here", self.parts[index])),
            None => Ok(()),
        }
    }
}

impl Opcode<'_> {
    /// Whether some modifier is a floating-point type.
    pub fn names_float(&self) -> bool {
        self.parts.iter().skip(1).any(|part| matches!(*part, "f32" | "f64" | "f16" | "f16x2" | "bf16" | "bf16x2"))
    }
}
