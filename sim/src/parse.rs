//! Tokens to a module ([`Ast`]). Names are not resolved here.

use crate::ast::*;
use crate::error::ParseError;
use crate::lexer::{Token, TokenKind, tokenize};

type Result<T> = std::result::Result<T, ParseError>;

/// Blocks nested deeper than this are refused (compilers nest two deep).
const MAX_DEPTH: u32 = 64;

/// Reads a module.
pub(crate) fn parse(text: &str) -> Result<Ast> {
    let mut parser = Parser { tokens: tokenize(text)?, next: 0, depth: 0 };
    let mut ast = Ast::default();
    while parser.kind() != TokenKind::End {
        parser.module_item(&mut ast)?;
    }
    Ok(ast)
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    next: usize,
    depth: u32,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens[self.next.min(self.tokens.len() - 1)]
    }

    fn peek_second(&self) -> Token<'a> {
        self.tokens[(self.next + 1).min(self.tokens.len() - 1)]
    }

    fn kind(&self) -> TokenKind {
        self.peek().kind
    }

    fn take(&mut self) -> Token<'a> {
        let token = self.peek();
        self.next += 1;
        token
    }

    fn error<T>(&self, wanted: &str) -> Result<T> {
        let token = self.peek();
        let found = match token.kind {
            TokenKind::End => "the end of the text".to_owned(),
            _ => format!("`{}`", token.text),
        };
        Err(ParseError::syntax(token.line, format!("expected {wanted}, found {found}")))
    }

    fn is_mark(&self, mark: u8) -> bool {
        self.kind() == TokenKind::Mark(mark)
    }

    fn accept(&mut self, mark: u8) -> bool {
        let found = self.is_mark(mark);
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, mark: u8) -> Result<()> {
        if self.accept(mark) { Ok(()) } else { self.error(&format!("`{}`", mark as char)) }
    }

    fn accept_word(&mut self, word: &str) -> bool {
        let found = self.kind() == TokenKind::Word && self.peek().text == word;
        self.next += usize::from(found);
        found
    }

    fn word(&mut self, what: &str) -> Result<&'a str> {
        if self.kind() == TokenKind::Word { Ok(self.take().text) } else { self.error(what) }
    }

    fn integer(&mut self) -> Result<i128> {
        let negative = self.accept(b'-');
        if self.kind() != TokenKind::Number {
            return self.error("an integer");
        }
        let token = self.take();
        match literal(token)? {
            Operand::Integer(value) => Ok(if negative { -value } else { value }),
            _ => Err(ParseError::syntax(token.line, format!("expected an integer, found `{}`", token.text))),
        }
    }

    fn small<T: TryFrom<i128>>(&mut self) -> Result<T> {
        let line = self.peek().line;
        let value = self.integer()?;
        T::try_from(value).map_err(|_| ParseError::syntax(line, format!("{value} is out of range here")))
    }

    fn skip_line(&mut self) {
        let line = self.peek().line;
        while self.kind() != TokenKind::End && self.peek().line == line {
            self.next += 1;
        }
    }

    fn skip_statement(&mut self) -> Result<()> {
        while !self.accept(b';') {
            if self.kind() == TokenKind::End {
                return self.error("`;`");
            }
            self.next += 1;
        }
        Ok(())
    }

    fn skip_braces(&mut self) -> Result<()> {
        self.expect(b'{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.kind() {
                TokenKind::End => return self.error("`}`"),
                TokenKind::Mark(b'{') => depth += 1,
                TokenKind::Mark(b'}') => depth -= 1,
                _ => {}
            }
            self.next += 1;
        }
        Ok(())
    }

    fn module_item(&mut self, ast: &mut Ast) -> Result<()> {
        let token = self.peek();
        if self.accept(b';') {
            return Ok(());
        }
        if token.kind != TokenKind::Word {
            return self.error("a directive");
        }
        match token.text {
            ".version" | ".target" | ".address_size" => self.skip_line(),
            ".file" => {
                self.next += 1;
                let number = self.small()?;
                if self.kind() != TokenKind::Text {
                    return self.error("a file name");
                }
                let name = self.take().text.to_owned();
                ast.files.push((number, name));
                if self.accept(b',') {
                    self.integer()?;
                    self.expect(b',')?;
                    self.integer()?;
                }
            }
            ".loc" => self.skip_line(),
            ".section" => {
                self.next += 1;
                self.word("a section name")?;
                while self.kind() == TokenKind::Word {
                    self.next += 1;
                }
                self.skip_braces()?;
            }
            ".pragma" | ".alias" => self.skip_statement()?,
            _ => return self.definition(ast),
        }
        Ok(())
    }

    fn definition(&mut self, ast: &mut Ast) -> Result<()> {
        let mut is_extern = false;
        loop {
            let line = self.peek().line;
            match self.peek().text {
                ".extern" => is_extern = true,
                ".visible" | ".weak" | ".common" => {}
                ".entry" | ".func" => {
                    ast.functions.push(self.function()?);
                    return Ok(());
                }
                ".global" | ".const" | ".shared" => {
                    for variable in self.variables(is_extern)? {
                        ast.variables.push((variable, line));
                    }
                    return Ok(());
                }
                _ => return self.error("a variable, `.entry` or `.func`"),
            }
            self.next += 1;
        }
    }

    fn function(&mut self) -> Result<Function> {
        let line = self.peek().line;
        let is_entry = self.take().text == ".entry";
        let returns = if self.is_mark(b'(') { self.parameters()? } else { Vec::new() };
        let name = self.word("a function name")?.to_owned();
        let parameters = if self.is_mark(b'(') { self.parameters()? } else { Vec::new() };
        let (mut max_threads, mut cluster) = (None, ClusterDirectives::default());
        while self.kind() == TokenKind::Word {
            match self.take().text {
                ".maxntid" | ".reqntid" => {
                    let mut threads = self.small::<u32>()?;
                    while self.accept(b',') {
                        threads = threads.saturating_mul(self.small::<u32>()?);
                    }
                    max_threads = Some(threads);
                }
                ".minnctapersm" | ".maxnctapersm" | ".maxnreg" => {
                    self.integer()?;
                }
                ".maxclusterrank" => cluster.most = Some(self.small::<u32>()?),
                ".reqnctapercluster" => {
                    let mut sizes = [self.small::<u32>()?, 1, 1];
                    for size in &mut sizes[1..] {
                        if self.accept(b',') {
                            *size = self.small::<u32>()?;
                        }
                    }
                    cluster.required = Some(sizes);
                }
                ".explicitcluster" => cluster.explicit = true,
                ".noreturn" => {}
                ".abi_preserve" | ".abi_preserve_control" => {
                    self.integer()?;
                }
                ".pragma" => self.skip_statement()?,
                other => {
                    return Err(ParseError::syntax(
                        self.tokens[self.next - 1].line,
                        format!("unknown function directive `{other}`"),
                    ));
                }
            }
        }
        let body = if self.accept(b';') {
            None
        } else {
            self.expect(b'{')?;
            Some(self.statements()?)
        };
        Ok(Function { name, is_entry, returns, parameters, max_threads, cluster, body, line })
    }

    fn parameters(&mut self) -> Result<Vec<Variable>> {
        self.expect(b'(')?;
        let mut list = Vec::new();
        while !self.accept(b')') {
            list.push(self.variable_head(false)?);
            if !self.accept(b',') && !self.is_mark(b')') {
                return self.error("`,` or `)`");
            }
        }
        Ok(list)
    }

    /// `.space .align 8 .b8 name[16]`, up to the initialiser.
    fn variable_head(&mut self, is_extern: bool) -> Result<Variable> {
        let line = self.peek().line;
        let space = match self.word("a state space")? {
            ".reg" => StateSpace::Register,
            ".global" => StateSpace::Global,
            ".const" => StateSpace::Const,
            ".shared" | ".shared::cta" => StateSpace::Shared,
            ".local" => StateSpace::Local,
            ".param" => StateSpace::Param,
            other => {
                return Err(ParseError::syntax(line, format!("`{other}` is not a state space")));
            }
        };
        let (mut align, mut vector, mut element) = (None, 1, None);
        while self.kind() == TokenKind::Word && self.peek().text.starts_with('.') {
            match self.take().text {
                ".align" => {
                    let value: u64 = self.small()?;
                    if !value.is_power_of_two() || value > 1 << 20 {
                        return Err(ParseError::syntax(
                            line,
                            format!("an alignment of {value} is not a power of two up to 2^20"),
                        ));
                    }
                    // In `.ptr .global .align 16` the alignment is the pointee's, after the type.
                    if element.is_none() {
                        align = Some(value);
                    }
                }
                ".ptr" | ".global" | ".const" | ".shared" | ".local" | ".managed" => {}
                ".attribute" => {
                    self.expect(b'(')?;
                    while !self.accept(b')') {
                        if self.kind() == TokenKind::End {
                            return self.error("`)`");
                        }
                        self.next += 1;
                    }
                }
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                other => match Type::from_name(&other[1..]) {
                    Some(found) => element = Some(found),
                    None => {
                        return Err(ParseError::syntax(line, format!("`{other}` is not a type")));
                    }
                },
            }
        }
        let Some(element) = element else {
            return self.error("a type");
        };
        self.variable_name(space, element, vector, align, is_extern)
    }

    fn variable_name(
        &mut self,
        space: StateSpace,
        element: Type,
        vector: u64,
        align: Option<u64>,
        is_extern: bool,
    ) -> Result<Variable> {
        let line = self.peek().line;
        let name = self.word("a variable name")?.to_owned();
        let count = if self.accept(b'<') {
            let count: u32 = self.small()?;
            self.expect(b'>')?;
            if count > 1 << 20 {
                return Err(ParseError::syntax(line, format!("{count} registers are more than the limit of 2^20")));
            }
            Some(count)
        } else {
            None
        };
        let unit = u64::from(element.bytes()) * vector;
        let mut bytes = unit;
        while self.accept(b'[') {
            let length: u64 = if self.is_mark(b']') { 0 } else { self.small()? };
            self.expect(b']')?;
            bytes = bytes
                .checked_mul(length)
                .filter(|bytes| *bytes <= 1 << 32)
                .ok_or_else(|| ParseError::syntax(line, "the variable is larger than 4 GiB"))?;
        }
        Ok(Variable {
            name,
            space,
            element,
            bytes,
            align: align.unwrap_or(unit),
            is_extern,
            count,
            initial: Vec::new(),
        })
    }

    /// A declaration up to its `;`: one variable, or several of the same type.
    fn variables(&mut self, is_extern: bool) -> Result<Vec<Variable>> {
        let mut list = vec![self.variable_head(is_extern)?];
        loop {
            if self.accept(b'=') {
                let element = list[0].element;
                let mut initial = Vec::new();
                self.initial_values(element, &mut initial, 0)?;
                if let Some(last) = list.last_mut() {
                    // `name[] = {...}` takes its size from the initialiser.
                    last.bytes = last.bytes.max(initial.len() as u64 * u64::from(element.bytes()));
                    last.initial = initial;
                }
            }
            if self.accept(b';') {
                return Ok(list);
            }
            self.expect(b',')?;
            let first = &list[0];
            let (space, element, align) = (first.space, first.element, first.align);
            list.push(self.variable_name(space, element, 1, Some(align), is_extern)?);
        }
    }

    fn initial_values(&mut self, element: Type, list: &mut Vec<InitialValue>, depth: u32) -> Result<()> {
        if depth > MAX_DEPTH {
            return self.error("an initialiser nested less deeply");
        }
        if self.accept(b'{') {
            while !self.accept(b'}') {
                self.initial_values(element, list, depth + 1)?;
                if !self.accept(b',') && !self.is_mark(b'}') {
                    return self.error("`,` or `}`");
                }
            }
            return Ok(());
        }
        if self.kind() == TokenKind::Number && self.peek_second().kind == TokenKind::Mark(b'(') {
            let line = self.peek().line;
            let mask = self.integer()?;
            self.expect(b'(')?;
            let (symbol, offset) = self.initial_address()?;
            self.expect(b')')?;
            let shift = u128::try_from(mask).map_or(128, |mask| mask.trailing_zeros());
            if shift > 56 || mask != 0xff << shift {
                return Err(ParseError::syntax(line, format!("{mask:#x} does not mask one byte")));
            }
            list.push(InitialValue::Address { symbol, offset, shift });
        } else if self.kind() == TokenKind::Word {
            let (symbol, offset) = self.initial_address()?;
            list.push(InitialValue::Address { symbol, offset, shift: 0 });
        } else {
            let negative = self.accept(b'-');
            if self.kind() != TokenKind::Number {
                return self.error("an initial value");
            }
            let value = literal(self.take())?;
            let bits = literal_bits(&value, negative, element).unwrap_or(0);
            list.push(InitialValue::Bits(bits));
        }
        Ok(())
    }

    fn initial_address(&mut self) -> Result<(String, i64)> {
        let generic = self.accept_word("generic");
        if generic {
            self.expect(b'(')?;
        }
        let symbol = self.word("a symbol")?.to_owned();
        if generic {
            self.expect(b')')?;
        }
        Ok((symbol, self.offset()?))
    }

    fn offset(&mut self) -> Result<i64> {
        if self.accept(b'+') || self.is_mark(b'-') { self.small() } else { Ok(0) }
    }

    /// Statements up to and including the closing `}`.
    fn statements(&mut self) -> Result<Vec<Statement>> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.error("blocks nested less deeply");
        }
        let mut list = Vec::new();
        while !self.accept(b'}') {
            self.statement(&mut list)?;
        }
        self.depth -= 1;
        Ok(list)
    }

    fn statement(&mut self, list: &mut Vec<Statement>) -> Result<()> {
        if self.accept(b';') {
            return Ok(());
        }
        if self.accept(b'{') {
            list.push(Statement::Block(self.statements()?));
            return Ok(());
        }
        let token = self.peek();
        if token.kind == TokenKind::Word && self.peek_second().kind == TokenKind::Mark(b':') {
            self.next += 2;
            return self.labelled(token.text, list);
        }
        if token.kind == TokenKind::Word && token.text.starts_with('.') {
            return self.body_directive(list);
        }
        list.push(Statement::Instruction(self.instruction()?));
        Ok(())
    }

    fn labelled(&mut self, label: &str, list: &mut Vec<Statement>) -> Result<()> {
        let token = self.peek();
        if self.accept_word(".branchtargets") {
            let mut targets = vec![self.word("a label")?.to_owned()];
            while self.accept(b',') {
                targets.push(self.word("a label")?.to_owned());
            }
            self.expect(b';')?;
            list.push(Statement::BranchTargets(label.to_owned(), targets));
        } else if token.text == ".callprototype" || token.text == ".calltargets" {
            // Calls through a register pass no parameters here, so prototypes and target lists say nothing new.
            self.skip_statement()?;
        } else {
            list.push(Statement::Label(label.to_owned()));
        }
        Ok(())
    }

    fn body_directive(&mut self, list: &mut Vec<Statement>) -> Result<()> {
        let line = self.peek().line;
        match self.peek().text {
            ".loc" => {
                let location = self.location()?;
                list.push(Statement::Location(location));
            }
            ".pragma" => self.skip_statement()?,
            ".reg" | ".local" | ".shared" | ".param" | ".global" | ".const" => {
                for variable in self.variables(false)? {
                    list.push(Statement::Variable(variable, line));
                }
            }
            _ => return self.error("a statement"),
        }
        Ok(())
    }

    /// `.loc file line column[, function_name symbol[+offset], inlined_at file line column]`
    fn location(&mut self) -> Result<Location> {
        let line = self.take().line;
        let file = self.small()?;
        let mut location = Location { file, line: self.small()?, ..Location::default() };
        while self.kind() != TokenKind::End && self.peek().line == line {
            if self.accept_word("inlined_at") {
                location.inlined_at = Some((self.small()?, self.small()?));
            } else if self.kind() == TokenKind::LocationComment {
                location.comment = self.take().text.to_owned();
            } else {
                self.next += 1;
            }
        }
        Ok(location)
    }

    fn instruction(&mut self) -> Result<Instruction> {
        let line = self.peek().line;
        let guard = if self.accept(b'@') {
            let negate = self.accept(b'!');
            let name = self.word("a predicate")?.to_owned();
            Some(GuardName { name, negate })
        } else {
            None
        };
        let opcode = self.word("an instruction")?.to_owned();
        let mut operands = Vec::new();
        while !self.accept(b';') {
            operands.push(self.operand(0)?);
            if !self.accept(b',') && !self.is_mark(b';') {
                return self.error("`,` or `;`");
            }
        }
        Ok(Instruction { guard, opcode, operands, line })
    }

    fn operand_list(&mut self, close: u8, depth: u32) -> Result<Vec<Operand>> {
        let mut list = Vec::new();
        while !self.accept(close) {
            list.push(self.operand(depth + 1)?);
            if !self.accept(b',') && !self.is_mark(close) {
                return self.error("`,` or a closing bracket");
            }
        }
        Ok(list)
    }

    fn operand(&mut self, depth: u32) -> Result<Operand> {
        if depth > 4 {
            return self.error("an operand nested less deeply");
        }
        match self.kind() {
            TokenKind::Mark(b'{') => {
                self.next += 1;
                Ok(Operand::Vector(self.operand_list(b'}', depth)?))
            }
            TokenKind::Mark(b'[') => {
                self.next += 1;
                Ok(Operand::Address(self.operand_list(b']', depth)?))
            }
            TokenKind::Mark(b'(') => {
                self.next += 1;
                Ok(Operand::List(self.operand_list(b')', depth)?))
            }
            TokenKind::Mark(b'!') => {
                self.next += 1;
                Ok(Operand::Not(self.word("a predicate")?.to_owned()))
            }
            TokenKind::Mark(b'-') => {
                self.next += 1;
                if self.kind() != TokenKind::Number {
                    return self.error("a number");
                }
                Ok(match literal(self.take())? {
                    Operand::Integer(value) => Operand::Integer(-value),
                    Operand::Single(bits) => Operand::Single(bits ^ 1 << 31),
                    Operand::Double(bits) => Operand::Double(bits ^ 1 << 63),
                    other => other,
                })
            }
            TokenKind::Number => literal(self.take()),
            TokenKind::Word => {
                let name = self.take().text.to_owned();
                if self.accept(b'|') {
                    let second = self.operand(depth + 1)?;
                    return Ok(Operand::Pair(Box::new(Operand::Name(name, 0)), Box::new(second)));
                }
                let offset = self.offset()?;
                Ok(Operand::Name(name, offset))
            }
            _ => self.error("an operand"),
        }
    }
}

/// The value of a number token (PTX ISA, "Constants").
fn literal(token: Token<'_>) -> Result<Operand> {
    let text = token.text;
    let bad = || ParseError::syntax(token.line, format!("`{text}` is not a number"));
    let lower = text.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0f") {
        return Ok(Operand::Single(u32::from_str_radix(hex, 16).map_err(|_| bad())?));
    }
    if let Some(hex) = lower.strip_prefix("0d") {
        return Ok(Operand::Double(u64::from_str_radix(hex, 16).map_err(|_| bad())?));
    }
    if lower.contains('.') || (lower.contains('e') && !lower.starts_with("0x")) {
        let value: f64 = lower.parse().map_err(|_| bad())?;
        return Ok(Operand::Double(value.to_bits()));
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let value = if let Some(hex) = digits.strip_prefix("0x") {
        u64::from_str_radix(hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        u64::from_str_radix(binary, 2)
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(&digits[1..], 8)
    } else {
        digits.parse()
    };
    Ok(Operand::Integer(i128::from(value.map_err(|_| bad())?)))
}

/// The bits of a literal used as a value of `kind`; `None` where it is no literal.
pub(crate) fn literal_bits(operand: &Operand, negative: bool, kind: Type) -> Option<u64> {
    let double = |bits: u64| {
        let value = f64::from_bits(bits);
        if negative { -value } else { value }
    };
    let mask = match kind.bytes() {
        bytes @ 0..8 => (1u64 << (8 * bytes)) - 1,
        _ => u64::MAX,
    };
    Some(match *operand {
        Operand::Integer(value) if kind.is_float() && kind.bytes() >= 4 => {
            // A decimal integer given to a floating-point type is its value only if it is 0;
            // compilers print floats as hexadecimal bits.
            let value = if negative { -value } else { value };
            if kind == Type::F64 { (value as f64).to_bits() } else { u64::from((value as f32).to_bits()) }
        }
        Operand::Integer(value) => (if negative { -value } else { value }) as u64 & mask,
        Operand::Single(bits) => {
            let bits = if negative { bits ^ 1 << 31 } else { bits };
            if kind == Type::F64 { f64::from(f32::from_bits(bits)).to_bits() } else { u64::from(bits) & mask }
        }
        Operand::Double(bits) if kind.bytes() == 8 => double(bits).to_bits(),
        Operand::Double(bits) => u64::from((double(bits) as f32).to_bits()) & mask,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_llvm_style_module() {
        let text = r#"
            .version 8.6
            .target sm_90a, debug
            .address_size 64
            .extern .shared .align 1024 .b8 pool[];
            .file 1 "/a/b.rs"
            .global .align 8 .u64 table[2] = {generic(other), generic(other)+8};
            .global .align 1 .b8 bytes[4] = {1, 2, 0xFF(generic(other)), 0xFF00(other)};
            .visible .entry k(.param .u64 .ptr .global .align 1 p0, .param .align 8 .b8 p1[16])
            .maxntid 384
            .minnctapersm 1
            {
                .reg .pred %p<2>;
                .loc 1 7 3, function_name $L__info_string0, inlined_at 1 9 1 // b.rs:7 @[ c.rs:9 ]
                @!%p1 bra $L__BB0_1;
                { .reg .b32 t; mov.b32 t, 0f3F800000; }
            $L__BB0_1:
                ret;
            }
            .section .debug_str { .b8 104 .b8 0 }
        "#;
        let ast = parse(text).unwrap();
        assert_eq!(ast.functions[0].max_threads, Some(384));
        assert_eq!(ast.functions[0].parameters[1].bytes, 16);
        let body = ast.functions[0].body.as_ref().unwrap();
        let location = Location { file: 1, line: 7, inlined_at: Some((1, 9)), comment: "// b.rs:7 @[ c.rs:9 ]".into() };
        assert!(matches!(&body[1], Statement::Location(found) if *found == location));
        assert_eq!(
            ast.variables[2].0.initial[3],
            InitialValue::Address { symbol: "other".into(), offset: 0, shift: 8 }
        );
    }

    #[test]
    fn literals() {
        let value = |text| literal(Token { kind: TokenKind::Number, text, line: 1 });
        assert_eq!(value("0x10U").unwrap(), Operand::Integer(16));
        assert_eq!(value("010").unwrap(), Operand::Integer(8));
        assert_eq!(value("0F3f800000").unwrap(), Operand::Single(0x3f80_0000));
        assert_eq!(value("1.5e-1").unwrap(), Operand::Double(0.15f64.to_bits()));
        assert!(value("12q").is_err());
        assert_eq!(literal_bits(&Operand::Integer(1), true, Type::S16), Some(0xffff));
    }

    proptest! {
        #[test]
        fn token_soup_never_panics(words in proptest::collection::vec(prop_oneof![
            Just(".reg"), Just(".b32"), Just("%r<4>"), Just("{"), Just("}"), Just("("), Just(")"), Just("["),
            Just("]"), Just(";"), Just(","), Just("ld.global.u32"), Just("%r1"), Just("0x"), Just("1"), Just("-"),
            Just("@%p1"), Just("bra"), Just("L:"), Just(".entry"), Just("k"), Just(".func"), Just(".loc 1 2 3\n"),
            Just("="), Just("generic"), Just(".section"), Just(".param"), Just("\""), Just("/*"), Just("|"),
        ], 0..60)) {
            let _ = parse(&words.join(" "));
        }
    }
}
