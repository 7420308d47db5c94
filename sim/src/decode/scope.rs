//! Names and what they stand for, block by block.

use std::collections::HashMap;

use crate::ast::Type;
use crate::registers::{Predicate, R16, R32, R64, Register};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Symbol {
    Register(Register),
    Predicate(Predicate),
    /// Offset in shared memory.
    Shared(u32),
    /// The start of dynamic shared memory, which each kernel has elsewhere.
    DynamicShared,
    /// Offset in a lane's local memory, where call parameters live too.
    Local {
        place: u32,
        bytes: u32,
    },
    /// Offset in the kernel's parameters.
    KernelParameter(u32),
    Global(u32),
    Function(u32),
    Label(u32),
    /// A variable of another module.
    External,
}

impl Symbol {
    /// The register number `index` of the file that `kind` belongs to.
    pub fn register(kind: Type, index: u32) -> Self {
        match kind.bytes() {
            _ if kind == Type::Pred => Self::Predicate(Predicate(index)),
            1 | 2 => Self::Register(Register::R16(R16(index))),
            4 => Self::Register(Register::R32(R32(index))),
            _ => Self::Register(Register::R64(R64(index))),
        }
    }

    fn offset_by(self, number: u32) -> Self {
        match self {
            Self::Predicate(Predicate(first)) => Self::Predicate(Predicate(first + number)),
            Self::Register(Register::R16(R16(first))) => Self::Register(Register::R16(R16(first + number))),
            Self::Register(Register::R32(R32(first))) => Self::Register(Register::R32(R32(first + number))),
            Self::Register(Register::R64(R64(first))) => Self::Register(Register::R64(R64(first + number))),
            other => other,
        }
    }
}

#[derive(Debug, Default)]
struct Scope {
    names: HashMap<String, Symbol>,
    /// `%r<100>`: prefix, first register, how many.
    ranges: HashMap<String, (Symbol, u32)>,
}

/// A stack of scopes; the first is the module's.
#[derive(Debug)]
pub(crate) struct Scopes(Vec<Scope>);

impl Default for Scopes {
    fn default() -> Self {
        Self(vec![Scope::default()])
    }
}

impl Scopes {
    pub fn enter(&mut self) {
        self.0.push(Scope::default());
    }

    pub fn leave(&mut self) {
        if self.0.len() > 1 {
            self.0.pop();
        }
    }

    /// Whether names are now being declared inside a function.
    pub fn in_function(&self) -> bool {
        self.0.len() > 1
    }

    fn innermost(&mut self) -> &mut Scope {
        let last = self.0.len() - 1;
        &mut self.0[last]
    }

    pub fn insert(&mut self, name: String, symbol: Symbol) {
        self.innermost().names.insert(name, symbol);
    }

    pub fn insert_range(&mut self, prefix: String, first: Symbol, count: u32) {
        self.innermost().ranges.insert(prefix, (first, count));
    }

    pub fn find(&self, name: &str) -> Option<Symbol> {
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[prefix.len()..].parse().ok();
        self.0.iter().rev().find_map(|scope| {
            if let Some(symbol) = scope.names.get(name) {
                return Some(*symbol);
            }
            let (first, count) = scope.ranges.get(prefix)?;
            number.filter(|number| number < count).map(|number| first.offset_by(number))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_scopes_hide_outer_ones() {
        let mut scopes = Scopes::default();
        scopes.insert_range("%r".into(), Symbol::register(Type::B32, 10), 4);
        scopes.enter();
        scopes.insert("%r2".into(), Symbol::register(Type::B64, 0));
        assert_eq!(scopes.find("%r3"), Some(Symbol::register(Type::B32, 13)));
        assert_eq!(scopes.find("%r2"), Some(Symbol::register(Type::B64, 0)));
        assert_eq!(scopes.find("%r4"), None);
        scopes.leave();
        assert_eq!(scopes.find("%r2"), Some(Symbol::register(Type::B32, 12)));
    }
}
