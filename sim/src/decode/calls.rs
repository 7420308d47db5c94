//! Which function may call which: what a kernel consists of, where recursion is, and where its shared memory lies.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{SHARED_START, align_up};
use crate::ast::{Ast, InitialValue, Operand, StateSpace, Statement, Variable};
use crate::program::SharedLayout;

/// The functions of a module, by number, and the calls between them. A function counts as called where it is named.
#[derive(Debug, Default)]
pub(super) struct Calls {
    numbers: HashMap<String, usize>,
    /// Called functions; the last place stands for all functions whose address is taken.
    edges: Vec<Vec<usize>>,
    /// Functions of the same group may call each other, if it has a cycle.
    group: Vec<usize>,
    cyclic: Vec<bool>,
    /// Module-level shared variables that a function names.
    shared: Vec<Vec<usize>>,
}

/// Calls `visit` with every name in an operand.
fn names<'a>(operand: &'a Operand, visit: &mut dyn FnMut(&'a str)) {
    match operand {
        Operand::Name(name, _) | Operand::Not(name) => visit(name),
        Operand::Vector(list) | Operand::Address(list) | Operand::List(list) => {
            list.iter().for_each(|operand| names(operand, visit));
        }
        Operand::Pair(first, second) => {
            names(first, visit);
            names(second, visit);
        }
        Operand::Integer(_) | Operand::Single(_) | Operand::Double(_) => {}
    }
}

/// Calls `visit` with every instruction of a body: its opcode and operands.
fn instructions<'a>(body: &'a [Statement], visit: &mut dyn FnMut(&'a str, &'a [Operand])) {
    for statement in body {
        match statement {
            Statement::Block(inner) => instructions(inner, visit),
            Statement::Instruction(instruction) => visit(&instruction.opcode, &instruction.operands),
            _ => {}
        }
    }
}

/// What stands for the function in a call: the first operand that is no list.
fn callee(operands: &[Operand]) -> Option<&str> {
    operands.iter().find_map(|operand| match operand {
        Operand::Name(name, _) => Some(name.as_str()),
        _ => None,
    })
}

/// Calls `visit` with every shared variable of a body.
fn shared_variables<'a>(body: &'a [Statement], visit: &mut dyn FnMut(&'a Variable)) {
    for statement in body {
        match statement {
            Statement::Block(inner) => shared_variables(inner, visit),
            Statement::Variable(variable, _) if variable.space == StateSpace::Shared => visit(variable),
            _ => {}
        }
    }
}

impl Calls {
    pub fn new(ast: &Ast) -> Self {
        let mut calls = Self::default();
        for function in &ast.functions {
            let next = calls.numbers.len();
            calls.numbers.entry(function.name.clone()).or_insert(next);
        }
        let count = calls.numbers.len();
        calls.edges = vec![Vec::new(); count + 1];
        calls.shared = vec![Vec::new(); count];
        let shared: HashMap<&str, usize> = ast
            .variables
            .iter()
            .enumerate()
            .filter(|(_, (variable, _))| variable.space == StateSpace::Shared)
            .map(|(index, (variable, _))| (variable.name.as_str(), index))
            .collect();
        let mut taken = HashSet::new();
        for (variable, _) in &ast.variables {
            taken.extend(variable.initial.iter().filter_map(|value| match value {
                InitialValue::Address { symbol, .. } => calls.numbers.get(symbol).copied(),
                InitialValue::Bits(_) => None,
            }));
        }
        for function in &ast.functions {
            let (Some(body), Some(&number)) = (&function.body, calls.numbers.get(&function.name)) else {
                continue;
            };
            let (mut called, mut used) = (HashSet::new(), HashSet::new());
            instructions(body, &mut |opcode, operands| {
                let callee = if opcode.split('.').next() == Some("call") { callee(operands) } else { None };
                if callee.is_some_and(|name| !calls.numbers.contains_key(name)) {
                    called.insert(count);
                }
                for operand in operands {
                    names(operand, &mut |name| {
                        if let Some(other) = calls.numbers.get(name) {
                            called.insert(*other);
                            if Some(name) != callee {
                                taken.insert(*other);
                            }
                        }
                        used.extend(shared.get(name));
                    });
                }
            });
            calls.edges[number] = called.into_iter().collect();
            calls.shared[number] = used.into_iter().collect();
            calls.edges[number].sort_unstable();
            calls.shared[number].sort_unstable();
        }
        calls.edges[count] = taken.into_iter().collect();
        calls.edges[count].sort_unstable();
        calls.find_groups();
        calls
    }

    /// Strongly connected groups: places in order of their end in a search, then a search against the calls.
    fn find_groups(&mut self) {
        let count = self.edges.len();
        let mut against = vec![Vec::new(); count];
        for (from, edges) in self.edges.iter().enumerate() {
            edges.iter().for_each(|to| against[*to].push(from));
        }
        let (mut seen, mut ends) = (vec![false; count], Vec::new());
        for start in 0..count {
            let mut path = vec![(start, 0)];
            if std::mem::replace(&mut seen[start], true) {
                continue;
            }
            while let Some((at, next)) = path.last_mut() {
                match self.edges[*at].get(*next) {
                    Some(&to) => {
                        *next += 1;
                        if !std::mem::replace(&mut seen[to], true) {
                            path.push((to, 0));
                        }
                    }
                    None => {
                        ends.push(*at);
                        path.pop();
                    }
                }
            }
        }
        self.group = vec![usize::MAX; count];
        let mut sizes = Vec::new();
        for start in ends.into_iter().rev() {
            if self.group[start] != usize::MAX {
                continue;
            }
            let (group, mut open, mut size) = (sizes.len(), vec![start], 0);
            self.group[start] = group;
            while let Some(at) = open.pop() {
                size += 1;
                for &from in &against[at] {
                    if self.group[from] == usize::MAX {
                        self.group[from] = group;
                        open.push(from);
                    }
                }
            }
            sizes.push(size);
        }
        self.cyclic = sizes.iter().map(|size| *size > 1).collect();
        for (from, edges) in self.edges.iter().enumerate() {
            if edges.contains(&from) {
                self.cyclic[self.group[from]] = true;
            }
        }
    }

    /// A function's number.
    pub fn number(&self, name: &str) -> Option<usize> {
        self.numbers.get(name).copied()
    }

    /// Whether a function may be called again before it has returned.
    pub fn is_recursive(&self, function: usize) -> bool {
        self.group.get(function).is_some_and(|group| self.cyclic[*group])
    }

    /// Whether a call by one function of another, or through a register (`None`), may lead back to the caller.
    pub fn may_return(&self, from: usize, to: Option<usize>) -> bool {
        let to = to.unwrap_or(self.edges.len() - 1);
        self.is_recursive(from) && self.group.get(from) == self.group.get(to)
    }

    /// A function and all that it may call.
    pub fn reached(&self, from: usize) -> Vec<usize> {
        let mut list = self.search(from);
        list.retain(|function| *function + 1 < self.edges.len());
        list
    }

    /// Whether a function may lead to a call through a register.
    pub fn calls_indirectly(&self, from: usize) -> bool {
        self.search(from).contains(&(self.edges.len() - 1))
    }

    fn search(&self, from: usize) -> Vec<usize> {
        let (mut seen, mut list, mut next) = (HashSet::from([from]), vec![from], 0);
        while let Some(&at) = list.get(next) {
            next += 1;
            list.extend(self.edges[at].iter().filter(|to| seen.insert(**to)));
        }
        list
    }

    /// Places of all shared variables of a size, first the module's, then those of bodies, in the order of the text; and what
    /// each entry has, by function number. A variable has the same place in all kernels that use it.
    pub fn shared_layout(&self, ast: &Ast) -> Result<(VecDeque<u32>, HashMap<usize, SharedLayout>), String> {
        // Variables, those of bodies with their function.
        let mut variables: Vec<(&Variable, Option<usize>)> = Vec::new();
        let mut by_index = HashMap::new();
        for (index, (variable, _)) in ast.variables.iter().enumerate() {
            if variable.space == StateSpace::Shared {
                by_index.insert(index, variables.len());
                variables.push((variable, None));
            }
        }
        for function in &ast.functions {
            if let Some(body) = &function.body {
                let number = self.number(&function.name);
                shared_variables(body, &mut |variable| variables.push((variable, number)));
            }
        }
        let mut in_function: HashMap<usize, Vec<usize>> = HashMap::new();
        for (index, (_, function)) in variables.iter().enumerate() {
            if let Some(function) = function {
                in_function.entry(*function).or_default().push(index);
            }
        }
        let mut users: Vec<Vec<usize>> = vec![Vec::new(); variables.len()];
        let mut layouts = HashMap::new();
        for entry in ast.functions.iter().filter(|function| function.is_entry && function.body.is_some()) {
            let Some(number) = self.number(&entry.name).filter(|number| !layouts.contains_key(number)) else {
                continue;
            };
            layouts.insert(number, SharedLayout { end: SHARED_START, align: 16 });
            let mut used: HashSet<usize> = HashSet::new();
            for function in self.reached(number) {
                used.extend(self.shared[function].iter().filter_map(|index| by_index.get(index)));
                used.extend(in_function.get(&function).into_iter().flatten());
            }
            used.iter().for_each(|variable| users[*variable].push(number));
        }
        let mut places = vec![SHARED_START; variables.len()];
        let mut order: Vec<usize> = (0..variables.len()).collect();
        // What several kernels share comes first, so that no kernel has gaps because of another one's own.
        order.sort_by_key(|index| users[*index].len() < 2);
        for index in order {
            let variable = variables[index].0;
            let end = users[index].iter().map(|user| layouts[user].end).max().unwrap_or(SHARED_START);
            let place = align_up(u64::from(end), variable.align);
            let after = place + variable.bytes;
            if after > 1 << 24 {
                return Err(format!("{after} bytes of static shared memory"));
            }
            places[index] = place as u32;
            for user in &users[index] {
                if let Some(layout) = layouts.get_mut(user) {
                    layout.align = layout.align.max(variable.align as u32);
                    if variable.bytes > 0 {
                        layout.end = after as u32;
                    }
                }
            }
        }
        let sized = variables.iter().zip(places).filter(|((variable, _), _)| variable.bytes > 0);
        Ok((sized.map(|(_, place)| place).collect(), layouts))
    }
}
