//! From a parsed module to its decoded form: lays out variables, resolves names, compiles instructions.

mod asynchronous;
mod calls;
mod carry;
mod compare;
mod control;
mod convert;
mod float;
mod integer;
mod lanes;
mod memory;
mod moves;
mod opcode;
mod operands;
mod scope;
mod synchronisation;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::ast::{self, Ast, InitialValue, StateSpace, Statement, Variable};
use crate::error::ParseError;
use crate::program::*;
use crate::registers::RegisterCounts;
use calls::Calls;
use opcode::Opcode;
use scope::{Scopes, Symbol};

/// Shared addresses below this one belong to the system, so that null is not a buffer.
pub(crate) const SHARED_START: u32 = 1024;

/// Why an instruction cannot be decoded.
pub(crate) type Decoded<T> = Result<T, String>;

/// Decodes a module.
pub(crate) fn decode(ast: &Ast) -> Result<Module, ParseError> {
    let mut decoder = Decoder::new(ast)?;
    for function in &ast.functions {
        if let Some(body) = &function.body {
            decoder.function(function, body)?;
        }
    }
    decoder.finish()
}

/// A function's place, and the local memory its parameters are passed in.
#[derive(Debug, Clone, Default)]
struct FunctionInfo {
    start: Option<u32>,
    /// (local offset, bytes) of each return value and parameter.
    returns: Vec<(u32, u32)>,
    parameters: Vec<(u32, u32)>,
    /// What its body cannot be decoded for.
    refused: Vec<ParseError>,
}

struct Decoder {
    module: Module,
    scopes: Scopes,
    functions: Vec<FunctionInfo>,
    known_functions: HashSet<String>,
    /// Functions that have a body.
    bodies: HashSet<String>,
    files: HashMap<u32, String>,
    constants: HashMap<(u32, u64), u32>,
    locations: HashMap<ast::Location, u32>,
    location: u32,
    line: u32,
    guard: Option<Guard>,
    name: Arc<str>,
    names: HashMap<String, Arc<str>>,
    /// 32-bit registers that the instruction's operands name, and whether they are destinations.
    used: Vec<WgmmaUse>,
    calls: Calls,
    /// Places of the shared variables that are still to be declared.
    shared_places: VecDeque<u32>,
    shared_layouts: HashMap<usize, SharedLayout>,
    /// Constants that are offsets from the start of dynamic shared memory, by their size and value.
    dynamic: HashMap<(u32, i64), u32>,
    /// The function that is being decoded.
    current: usize,
    /// Labels of the function being decoded: the place of each, once known.
    labels: Vec<Option<u32>>,
    branch_tables: HashMap<String, Vec<String>>,
    is_entry: bool,
}

fn align_up(value: u64, align: u64) -> u64 {
    value.next_multiple_of(align.max(1))
}

/// The places `a:1` and `b:2` in a comment `// x:3:9 @[ a:1:5 @[ b:2:7 ] ]`.
fn inline_chain(comment: &str) -> Vec<String> {
    let without_column = |place: &str| {
        let place = place.trim_matches([' ', ']']);
        let column = place.rsplit_once(':').filter(|(rest, _)| rest.contains(':'));
        column.map_or(place, |(rest, _)| rest).to_owned()
    };
    comment.split("@[").skip(1).map(without_column).collect()
}

impl Decoder {
    fn new(ast: &Ast) -> Result<Self, ParseError> {
        let mut decoder = Self {
            module: Module {
                id: Module::next_id(),
                code: Vec::new(),
                entries: Vec::new(),
                functions: Vec::new(),
                variables: Vec::new(),
                locations: Vec::new(),
                registers: RegisterCounts { predicates: carry::CARRY.0 + 1, ..RegisterCounts::default() },
                constants: Constants::default(),
                frames: Vec::new(),
                local_bytes: 0,
            },
            scopes: Scopes::default(),
            functions: Vec::new(),
            known_functions: HashSet::new(),
            bodies: ast.functions.iter().filter(|f| f.body.is_some() && !f.is_entry).map(|f| f.name.clone()).collect(),
            files: ast.files.iter().cloned().collect(),
            constants: HashMap::new(),
            locations: HashMap::new(),
            location: u32::MAX,
            line: 0,
            guard: None,
            name: Arc::from(""),
            names: HashMap::new(),
            used: Vec::new(),
            calls: Calls::new(ast),
            shared_places: VecDeque::new(),
            shared_layouts: HashMap::new(),
            dynamic: HashMap::new(),
            current: 0,
            labels: Vec::new(),
            branch_tables: HashMap::new(),
            is_entry: false,
        };
        (decoder.shared_places, decoder.shared_layouts) =
            decoder.calls.shared_layout(ast).map_err(|message| ParseError::syntax(0, message))?;
        for (variable, line) in &ast.variables {
            decoder.line = *line;
            decoder.declare(variable, *line)?;
        }
        for function in &ast.functions {
            decoder.declare_function(function)?;
        }
        decoder.resolve_initialisers(ast)?;
        Ok(decoder)
    }

    /// The function that is being decoded has something that is not supported.
    fn refuse(&mut self, instruction: &str, reason: String) {
        if let Some(info) = self.functions.get_mut(self.current) {
            let instruction = instruction.to_owned();
            info.refused.push(ParseError::Unsupported { line: self.line, instruction, reason });
        }
    }

    fn syntax<T>(&self, message: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError::syntax(self.line, message))
    }

    /// Gives a variable or a range of registers its place and name.
    fn declare(&mut self, variable: &Variable, line: u32) -> Result<(), ParseError> {
        self.line = line;
        let symbol = match variable.space {
            StateSpace::Register => return self.declare_registers(variable),
            StateSpace::Shared if variable.bytes == 0 => Symbol::DynamicShared,
            StateSpace::Shared => Symbol::Shared(self.shared_places.pop_front().unwrap_or(SHARED_START)),
            StateSpace::Local | StateSpace::Param => Symbol::Local {
                place: self.allocate_local(variable.bytes, variable.align)?,
                bytes: variable.bytes as u32,
            },
            StateSpace::Global | StateSpace::Const => {
                if variable.is_extern {
                    self.scopes.insert(variable.name.clone(), Symbol::External);
                    return Ok(());
                }
                let has_address = |value: &InitialValue| matches!(value, InitialValue::Address { .. });
                if self.scopes.in_function() && variable.initial.iter().any(has_address) {
                    return self.syntax(format!(
                        "`{}` is initialised with an address inside a function, which is not supported",
                        variable.name
                    ));
                }
                self.module.variables.push(GlobalVariable {
                    name: variable.name.clone(),
                    bytes: variable.bytes,
                    element_bytes: variable.element.bytes(),
                    initial: variable.initial.clone(),
                    references: Vec::new(),
                });
                Symbol::Global(self.module.variables.len() as u32 - 1)
            }
        };
        self.scopes.insert(variable.name.clone(), symbol);
        Ok(())
    }

    fn allocate_local(&mut self, bytes: u64, align: u64) -> Result<u32, ParseError> {
        let offset = align_up(u64::from(self.module.local_bytes), align);
        if offset + bytes > 1 << 24 {
            return self
                .syntax(format!("{} bytes of local memory a lane; at most 16 MiB are supported", offset + bytes));
        }
        self.module.local_bytes = (offset + bytes) as u32;
        Ok(offset as u32)
    }

    fn declare_registers(&mut self, variable: &Variable) -> Result<(), ParseError> {
        let number = variable.count.unwrap_or(1);
        let counts = &mut self.module.registers;
        let counter = match variable.element.bytes() {
            _ if variable.element == ast::Type::Pred => &mut counts.predicates,
            1 | 2 => &mut counts.r16,
            4 => &mut counts.r32,
            8 => &mut counts.r64,
            _ => {
                let reason = format!("registers of type {:?}", variable.element);
                self.refuse(".reg", reason);
                return Ok(());
            }
        };
        let first = *counter;
        *counter += number;
        if *counter > 1 << 22 {
            return self.syntax("more than 2^22 registers");
        }
        let symbol = Symbol::register(variable.element, first);
        match variable.count {
            Some(count) => self.scopes.insert_range(variable.name.clone(), symbol, count),
            None => self.scopes.insert(variable.name.clone(), symbol),
        }
        Ok(())
    }

    fn declare_function(&mut self, function: &ast::Function) -> Result<(), ParseError> {
        self.line = function.line;
        if self.known_functions.contains(&function.name) {
            return Ok(());
        }
        let mut info = FunctionInfo::default();
        if !function.is_entry {
            for (list, places) in [(&function.returns, &mut info.returns), (&function.parameters, &mut info.parameters)]
            {
                for variable in list {
                    if variable.space == StateSpace::Register {
                        return self.syntax(format!(
                            "parameter `{}` of `{}` is a register; it must be in `.param`",
                            variable.name, function.name
                        ));
                    }
                    let offset = self.allocate_local(variable.bytes, variable.align)?;
                    places.push((offset, variable.bytes as u32));
                }
            }
        }
        let number = self.functions.len() as u32;
        self.functions.push(info);
        self.module.frames.push(Frame::default());
        self.known_functions.insert(function.name.clone());
        self.scopes.insert(function.name.clone(), Symbol::Function(number));
        Ok(())
    }

    fn resolve_initialisers(&mut self, ast: &Ast) -> Result<(), ParseError> {
        for index in 0..self.module.variables.len() {
            let mut references = Vec::new();
            for value in &self.module.variables[index].initial {
                let InitialValue::Address { symbol, .. } = value else {
                    continue;
                };
                references.push(match self.scopes.find(symbol) {
                    Some(Symbol::Global(variable)) => Reference::Variable(variable),
                    Some(Symbol::Function(function)) => Reference::Function(function),
                    _ => {
                        self.line = ast.variables.get(index).map_or(0, |variable| variable.1);
                        return self.syntax(format!("`{symbol}` in an initialiser is no global variable or function"));
                    }
                });
            }
            self.module.variables[index].references = references;
        }
        Ok(())
    }

    fn function(&mut self, function: &ast::Function, body: &[Statement]) -> Result<(), ParseError> {
        self.line = function.line;
        self.location = u32::MAX;
        self.is_entry = function.is_entry;
        self.labels.clear();
        let start = self.module.code.len() as u32;
        self.current = self.calls.number(&function.name).unwrap_or(0);
        let (registers, local) = (self.module.registers, self.module.local_bytes);
        self.scopes.enter();
        if function.is_entry {
            let mut parameters = Vec::new();
            let mut end = 0u64;
            for variable in &function.parameters {
                let offset = align_up(end, variable.align);
                end = offset + variable.bytes;
                if end > 32764 {
                    return self.syntax(format!("{end} bytes of parameters; at most 32764 are allowed"));
                }
                parameters.push(Parameter {
                    name: variable.name.clone(),
                    offset: offset as u32,
                    bytes: variable.bytes as u32,
                });
                self.scopes.insert(variable.name.clone(), Symbol::KernelParameter(offset as u32));
            }
            self.module.entries.push(Entry {
                name: function.name.clone(),
                start,
                parameters,
                max_threads: function.max_threads,
                cluster: function.cluster,
                shared: self.shared_layouts.get(&self.current).copied().unwrap_or_default(),
                local_bytes: 0,
                refused: Vec::new(),
            });
        } else {
            if let Some(info) = self.functions.get_mut(self.current) {
                info.start = Some(start);
                for (variable, place) in
                    function.returns.iter().zip(&info.returns).chain(function.parameters.iter().zip(&info.parameters))
                {
                    let symbol = Symbol::Local { place: place.0, bytes: place.1 };
                    self.scopes.insert(variable.name.clone(), symbol);
                }
            }
        }
        self.block(body)?;
        self.line = function.line;
        self.guard = None;
        // A body that runs off its end returns, as ptxas makes it do.
        self.push(if function.is_entry { Op::Exit } else { Op::Return });
        self.scopes.leave();
        self.keep_frame(registers, local);
        self.patch_branches(start)
    }

    /// Remembers what the function that was decoded has of registers and local memory, from what there was before it.
    fn keep_frame(&mut self, before: RegisterCounts, local: u32) {
        let now = self.module.registers;
        let info = &self.functions[self.current];
        let own = info.returns.iter().chain(&info.parameters).map(|(place, bytes)| *place..place + bytes);
        let frame = Frame {
            r16: before.r16..now.r16,
            r32: before.r32..now.r32,
            r64: before.r64..now.r64,
            predicates: before.predicates..now.predicates,
            local: own.chain(std::iter::once(local..self.module.local_bytes)).collect(),
        };
        self.module.frames[self.current] = frame;
    }

    /// Branch targets are label numbers until all labels of the function have their place.
    fn patch_branches(&mut self, start: u32) -> Result<(), ParseError> {
        let place = |label: u32, line: u32| {
            self.labels
                .get(label as usize)
                .copied()
                .flatten()
                .ok_or_else(|| ParseError::syntax(line, "a branch target is missing"))
        };
        for instruction in &mut self.module.code[start as usize..] {
            let line = instruction.line;
            match &mut instruction.op {
                Op::Branch(target) => *target = place(*target, line)?,
                Op::BranchIndex { targets, .. } => {
                    for target in targets {
                        *target = place(*target, line)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn block(&mut self, statements: &[Statement]) -> Result<(), ParseError> {
        self.scopes.enter();
        for statement in statements {
            match statement {
                Statement::Label(name) => {
                    self.labels.push(None);
                    let label = Symbol::Label(self.labels.len() as u32 - 1);
                    self.scopes.insert(name.clone(), label);
                }
                Statement::BranchTargets(name, targets) => {
                    self.branch_tables.insert(name.clone(), targets.clone());
                }
                _ => {}
            }
        }
        for statement in statements {
            match statement {
                Statement::Label(name) => {
                    if let Some(Symbol::Label(label)) = self.scopes.find(name) {
                        self.labels[label as usize] = Some(self.module.code.len() as u32);
                    }
                }
                Statement::Instruction(instruction) => {
                    if let Err(reason) = self.instruction(instruction) {
                        self.refuse(&instruction.opcode, reason);
                        self.push(Op::Trap);
                    }
                }
                Statement::Location(location) => self.set_location(location),
                Statement::Variable(variable, line) => self.declare(variable, *line)?,
                Statement::Block(inner) => self.block(inner)?,
                Statement::BranchTargets(..) => {}
            }
        }
        self.scopes.leave();
        Ok(())
    }

    fn set_location(&mut self, location: &ast::Location) {
        if location.line == 0 {
            return;
        }
        let file = |number: u32| self.files.get(&number).cloned().unwrap_or_else(|| format!("file {number}"));
        if let Some(index) = self.locations.get(location) {
            self.location = *index;
            return;
        }
        let mut callers = inline_chain(&location.comment);
        if let (Some((number, line)), true) = (location.inlined_at, callers.is_empty()) {
            callers.push(format!("{}:{line}", file(number)));
        }
        let place = format!("{}:{}", file(location.file), location.line);
        self.location = self.module.locations.len() as u32;
        self.module.locations.push(SourceLocation { place, callers });
        self.locations.insert(location.clone(), self.location);
    }

    fn instruction(&mut self, instruction: &ast::Instruction) -> Decoded<()> {
        self.line = instruction.line;
        self.used.clear();
        self.name = match self.names.get(&instruction.opcode) {
            Some(name) => name.clone(),
            None => {
                let name: Arc<str> = Arc::from(instruction.opcode.as_str());
                self.names.insert(instruction.opcode.clone(), name.clone());
                name
            }
        };
        self.guard = match &instruction.guard {
            Some(guard) => Some(Guard { predicate: self.predicate_named(&guard.name)?, negate: guard.negate }),
            None => None,
        };
        let mut opcode = Opcode::new(&instruction.opcode);
        self.dispatch(&mut opcode, &instruction.operands)?;
        opcode.finish()
    }

    fn dispatch(&mut self, opcode: &mut Opcode<'_>, operands: &[ast::Operand]) -> Decoded<()> {
        match opcode.name() {
            "mov" | "cvta" | "isspacep" | "selp" | "slct" | "prmt" | "mapa" | "getctarank" => {
                self.decode_move(opcode, operands)
            }
            "setp" | "set" | "testp" => self.decode_compare(opcode, operands),
            "cvt" => self.decode_convert(opcode, operands),
            "add" | "sub" | "mul" | "mad" | "div" | "rem" | "min" | "max" | "abs" | "neg" | "fma"
                if float::is_float(opcode) =>
            {
                self.decode_float(opcode, operands)
            }
            "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" | "copysign" => {
                self.decode_float(opcode, operands)
            }
            "add" | "sub" | "mul" | "mad" | "mul24" | "mad24" | "div" | "rem" | "min" | "max" | "abs" | "neg"
            | "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "lop3" | "bfe" | "bfi" | "bmsk"
            | "szext" | "brev" | "clz" | "popc" | "bfind" | "fns" | "sad" | "addc" | "subc" | "madc" | "dp4a"
            | "dp2a" => self.decode_integer(opcode, operands),
            "ld" | "ldu" | "st" | "atom" | "red" | "prefetch" | "prefetchu" | "applypriority" | "discard"
            | "createpolicy" => self.decode_memory(opcode, operands),
            "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" | "pmevent" => {
                self.decode_control(opcode, operands)
            }
            "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" => self.decode_lanes(opcode, operands),
            "bar" | "barrier" | "membar" | "fence" | "mbarrier" | "nanosleep" | "setmaxnreg" | "griddepcontrol" => {
                self.decode_synchronisation(opcode, operands)
            }
            "cp" | "wgmma" | "ldmatrix" | "stmatrix" | "mma" | "tensormap" => {
                self.decode_asynchronous(opcode, operands)
            }
            _ => Err("no such instruction is known".to_owned()),
        }
    }

    /// Appends an instruction at the current line under the current guard.
    fn push(&mut self, op: Op) {
        self.module.code.push(Instruction {
            op,
            guard: self.guard,
            line: self.line,
            location: self.location,
            name: self.name.clone(),
            wgmma_registers: self.used.as_slice().into(),
        });
    }

    /// Keeps of the registers that instructions use those that a wgmma works on.
    fn number_wgmma_registers(&mut self) {
        let mut places: HashMap<u32, u32> = HashMap::new();
        for instruction in &self.module.code {
            if let Op::Wgmma(wgmma) = &instruction.op {
                let a = match &wgmma.a {
                    WgmmaA::Registers(registers) => &registers[..],
                    WgmmaA::Descriptor(_) => &[],
                };
                for register in wgmma.accumulators.iter().chain(a) {
                    let next = places.len() as u32;
                    places.entry(register.0).or_insert(next);
                }
            }
        }
        for instruction in &mut self.module.code {
            let known = instruction
                .wgmma_registers
                .iter()
                .filter_map(|used| Some(WgmmaUse { register: *places.get(&used.register)?, written: used.written }));
            instruction.wgmma_registers = known.collect();
        }
    }

    fn finish(mut self) -> Result<Module, ParseError> {
        self.number_wgmma_registers();
        self.module.functions = self
            .functions
            .iter()
            .map(|info| Callee {
                start: info.start.unwrap_or(u32::MAX),
                returns: info.returns.clone(),
                parameters: info.parameters.clone(),
            })
            .collect();
        let local_bytes = u64::from(self.module.local_bytes);
        for instruction in &mut self.module.code {
            match &mut instruction.op {
                // A function without a body is refused where it is called.
                Op::Call(target) => *target = self.functions[*target as usize].start.unwrap_or(0),
                Op::CopyLocal { from, to, bytes } if u64::from(*bytes) + u64::from((*from).max(*to)) > local_bytes => {
                    return Err(ParseError::syntax(instruction.line, "a call parameter is smaller than declared"));
                }
                _ => {}
            }
        }
        let mut refused = Vec::new();
        for entry in &mut self.module.entries {
            if self.calls.number(&entry.name).is_some_and(|number| self.calls.calls_indirectly(number)) {
                // Whatever a register may hold.
                entry.local_bytes = self.module.local_bytes;
            }
            for function in self.calls.number(&entry.name).map_or_else(Vec::new, |number| self.calls.reached(number)) {
                let Some(info) = self.functions.get(function) else {
                    continue;
                };
                entry.refused.extend(info.refused.iter().cloned());
                let ranges = &self.module.frames[function].local;
                entry.local_bytes = ranges.iter().map(|range| range.end).fold(entry.local_bytes, u32::max);
            }
            entry.refused.sort_by_key(ParseError::line);
            refused.extend(entry.refused.iter().cloned());
        }
        if self.module.entries.is_empty() {
            refused = self.functions.iter().flat_map(|info| info.refused.iter().cloned()).collect();
        }
        if self.module.entries.iter().all(|entry| !entry.refused.is_empty()) {
            refused.sort_by_key(ParseError::line);
            refused.dedup();
            match refused.len() {
                0 => {}
                1 => return Err(refused.remove(0)),
                _ => return Err(ParseError::Several { errors: refused }),
            }
        }
        Ok(self.module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inline_chains() {
        let chain = inline_chain("// a/b.rs:21:65 @[ c.rs:133:23 @[ d.rs:9:1 ] ]");
        assert_eq!(chain, ["c.rs:133", "d.rs:9"]);
        assert!(inline_chain("// a/b.rs:21:65").is_empty());
        assert!(inline_chain("").is_empty());
    }
}
