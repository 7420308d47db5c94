//! Calls, and functions that the host provides.

use super::{Context, Executed, Flow};
use crate::cta::ReturnTo;
use crate::error::Fault;
use crate::memory::{CODE_WINDOW, Copied, Window, window_offset};
use crate::program::{Frame, HostFunction, IndirectCall, Op};
use crate::registers::{LANES, lanes};

/// Calls nested deeper than this are an error.
const DEEPEST: usize = 1024;
/// Longest text that is printed or quoted, in bytes.
const LONGEST_TEXT: usize = 4096;

/// What a lane had in a function that it has called again.
#[derive(Debug, Clone, Default)]
pub(crate) struct SavedFrame {
    registers: Vec<u64>,
    local: Copied,
}

impl Context<'_> {
    pub(super) fn call(&mut self, index: usize, target: u32, callee: u32) -> Executed {
        let fragment = &mut self.warp.fragments[index];
        if fragment.stack.len() >= DEEPEST {
            return Err(Fault::Operand(format!("calls nested more than {DEEPEST} deep")));
        }
        fragment.stack.push(ReturnTo { pc: fragment.pc + 1, callee });
        Ok(Flow::Jump(target))
    }

    /// Returns, and after a call through a register hands over the results.
    pub(super) fn return_from(&mut self, index: usize, active: u32) -> Executed {
        let Some(ReturnTo { pc, callee }) = self.warp.fragments[index].stack.pop() else {
            return self.exit(index, active);
        };
        let module = self.module;
        if let (Some(callee), Op::CallIndirect(call)) =
            (module.functions.get(callee as usize), &module.code[pc as usize - 1].op)
        {
            for ((from, bytes), (to, _)) in callee.returns.iter().zip(&call.results) {
                self.copy_local(*from, *to, *bytes, active)?;
            }
        }
        Ok(Flow::Jump(pc))
    }

    pub(super) fn call_indirect(&mut self, index: usize, call: &IndirectCall) -> Executed {
        let mask = self.warp.fragments[index].mask;
        let targets = self.warp.registers.r64[call.address.0 as usize];
        let first = targets[mask.trailing_zeros() as usize % LANES];
        let same = lanes(mask).filter(|lane| targets[*lane] == first).fold(0, |all, lane| all | 1 << lane);
        let number = self.function_at(first)?;
        let callee = &self.module.functions[number as usize];
        let fits = |theirs: &[(u32, u32)], ours: &[(u32, u32)]| {
            theirs.len() == ours.len() && theirs.iter().zip(ours).all(|(theirs, ours)| theirs.1 <= ours.1)
        };
        if !fits(&callee.parameters, &call.arguments) || !fits(&callee.returns, &call.results) {
            return Err(Fault::Operand(
                "a call through a register of a function with other parameters or results".to_owned(),
            ));
        }
        for ((to, bytes), (from, _)) in callee.parameters.iter().zip(&call.arguments) {
            self.copy_local(*from, *to, *bytes, same)?;
        }
        if same != mask {
            let pc = self.warp.fragments[index].pc;
            self.split(index, pc, mask & !same, pc, same);
            let last = self.warp.fragments.len() - 1;
            self.call(last, callee.start, number)?;
            self.warp.fragments[last].pc = callee.start;
            return Ok(Flow::Restructured);
        }
        self.call(index, callee.start, number)
    }

    fn function_at(&self, address: u64) -> Result<u32, Fault> {
        let number = window_offset(address);
        let callee = usize::try_from(number).ok().and_then(|number| self.module.functions.get(number));
        match callee {
            Some(callee) if Window::of(address) == Window::Code && callee.start != u32::MAX => Ok(number as u32),
            _ => Err(Fault::Operand(format!(
                "call of address {address:#x}, which is no function (functions start at {CODE_WINDOW:#x})"
            ))),
        }
    }

    pub(super) fn save_frame(&mut self, frame: &Frame, active: u32) {
        let size = self.warp.local.len() / LANES;
        for lane in lanes(active) {
            let mut saved = SavedFrame::default();
            let registers = &self.warp.registers;
            let part = |range: &std::ops::Range<u32>| range.start as usize..range.end as usize;
            saved.registers.extend(registers.r16[part(&frame.r16)].iter().map(|row| u64::from(row[lane])));
            saved.registers.extend(registers.r32[part(&frame.r32)].iter().map(|row| u64::from(row[lane])));
            saved.registers.extend(registers.r64[part(&frame.r64)].iter().map(|row| row[lane]));
            let predicates = registers.predicates[part(&frame.predicates)].iter();
            saved.registers.extend(predicates.map(|mask| u64::from(mask >> lane & 1)));
            for range in &frame.local {
                self.warp.local.copy_out(lane * size + range.start as usize, range.len(), &mut saved.local);
            }
            self.warp.saved.entry(lane).or_default().push(saved);
        }
    }

    /// Takes back what was set aside last, but for these places of local memory.
    pub(super) fn restore_frame(&mut self, frame: &Frame, results: &[(u32, u32)], active: u32) {
        let size = self.warp.local.len() / LANES;
        for lane in lanes(active) {
            let Some(saved) = self.warp.saved.get_mut(&lane).and_then(Vec::pop) else {
                continue;
            };
            let registers = &mut self.warp.registers;
            let part = |range: &std::ops::Range<u32>| range.start as usize..range.end as usize;
            let mut values = saved.registers.iter().copied();
            let mut next = || values.next().unwrap_or(0);
            registers.r16[part(&frame.r16)].iter_mut().for_each(|row| row[lane] = next() as u16);
            registers.r32[part(&frame.r32)].iter_mut().for_each(|row| row[lane] = next() as u32);
            registers.r64[part(&frame.r64)].iter_mut().for_each(|row| row[lane] = next());
            for mask in &mut registers.predicates[part(&frame.predicates)] {
                *mask = *mask & !(1 << lane) | (next() as u32 & 1) << lane;
            }
            let base = lane * size;
            let mut kept = Vec::new();
            for (place, bytes) in results {
                let mut copied = Copied::default();
                self.warp.local.copy_out(base + *place as usize, *bytes as usize, &mut copied);
                kept.push(copied);
            }
            let mut start = 0;
            for range in &frame.local {
                self.warp.local.copy_in(base + range.start as usize, &saved.local, start, range.len());
                start += range.len();
            }
            for ((place, bytes), copied) in results.iter().zip(&kept) {
                self.warp.local.copy_in(base + *place as usize, copied, 0, *bytes as usize);
            }
        }
    }

    /// `vprintf` prints, and `__assertfail` is an error with its text.
    pub(super) fn host_call(
        &mut self,
        which: HostFunction,
        arguments: &[u32],
        result: Option<u32>,
        active: u32,
    ) -> Executed {
        let size = self.warp.local.len() / LANES;
        for lane in lanes(active) {
            self.fault_lanes = 1 << lane;
            let argument = |context: &mut Self, index: usize, bytes: usize| {
                let at = lane * size + arguments[index] as usize;
                read_word(&context.warp.local.data()[at..at + bytes])
            };
            let first = argument(self, 0, 8);
            let text = self.text_at(first, lane)?;
            match which {
                HostFunction::Assert => {
                    let (file, line, function) = (argument(self, 1, 8), argument(self, 2, 4), argument(self, 3, 8));
                    let (file, function) = (self.text_at(file, lane)?, self.text_at(function, lane)?);
                    return Err(Fault::Assertion { text, place: format!("{file}:{line}, {function}") });
                }
                HostFunction::Print => {
                    let place = argument(self, 1, 8);
                    let (printed, count) = self.format(&text, place, lane)?;
                    self.printed.push_str(&printed);
                    if let Some(result) = result {
                        self.warp.local.write(lane * size + result as usize, &count.to_le_bytes());
                    }
                }
            }
        }
        self.fault_lanes = 0;
        Ok(Flow::Next)
    }

    /// Bytes that a lane can read at a generic address.
    fn bytes_at(&mut self, address: u64, bytes: usize, lane: usize) -> Result<Vec<u8>, Fault> {
        let out_of_bounds = |place: String| Fault::OutOfBounds { place, bytes: bytes as u64 };
        match Window::of(address) {
            Window::Local => {
                let size = self.warp.local.len() / LANES;
                let at = window_offset(address) as usize;
                if at.checked_add(bytes).is_none_or(|end| end > size) {
                    return Err(out_of_bounds(format!("local memory + {at} (there are {size} bytes)")));
                }
                Ok(self.warp.local.data()[lane * size + at..lane * size + at + bytes].to_vec())
            }
            Window::Shared => {
                let at = window_offset(address) as usize;
                let shared = self.state.shared.data().get(at..at.saturating_add(bytes));
                shared.map(<[u8]>::to_vec).ok_or_else(|| out_of_bounds(format!("shared memory {at:#x}")))
            }
            _ => {
                self.perform(&[address; LANES], 1, bytes);
                let (allocation, offset) = self.memory.find(address, bytes as u64)?;
                Ok(allocation.bytes.data()[offset..offset + bytes].to_vec())
            }
        }
    }

    /// The text up to the zero that ends it.
    fn text_at(&mut self, address: u64, lane: usize) -> Result<String, Fault> {
        let mut bytes = Vec::new();
        while bytes.len() < LONGEST_TEXT {
            match self.bytes_at(address.wrapping_add(bytes.len() as u64), 1, lane)?[..] {
                [0] => break,
                [byte] => bytes.push(byte),
                _ => break,
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// What C's `printf` makes of a format, and how many arguments there were. Arguments lie one after the other, each
    /// aligned to its size.
    fn format(&mut self, format: &str, arguments: u64, lane: usize) -> Result<(String, u32), Fault> {
        let (mut out, mut count, mut offset) = (String::new(), 0, 0u64);
        let mut rest = format.chars().peekable();
        while let Some(character) = rest.next() {
            if character != '%' {
                out.push(character);
                continue;
            }
            let mut spec = Spec::default();
            while let Some(flag) = rest.next_if(|c| "-+ #0".contains(*c)) {
                spec.flags.push(flag);
            }
            let mut number = |context: &mut Self, rest: &mut std::iter::Peekable<std::str::Chars<'_>>| {
                if rest.next_if_eq(&'*').is_some() {
                    count += 1;
                    return context.argument(arguments, &mut offset, 4, lane).map(|value| Some(value as i32 as i64));
                }
                let mut value = None;
                while let Some(digit) = rest.peek().and_then(|c| c.to_digit(10)) {
                    rest.next();
                    value = Some((value.unwrap_or(0) * 10 + i64::from(digit)).min(LONGEST_TEXT as i64));
                }
                Ok(value)
            };
            spec.width = number(self, &mut rest)?;
            if rest.next_if_eq(&'.').is_some() {
                spec.precision = Some(number(self, &mut rest)?.unwrap_or(0));
            }
            let mut bytes = 4;
            while let Some(length) = rest.next_if(|c| "hlLqjzt".contains(*c)) {
                bytes = if length == 'h' { 4 } else { 8 };
            }
            let Some(conversion) = rest.next() else {
                break;
            };
            if conversion == '%' {
                out.push('%');
                continue;
            }
            if "fFeEgGaAsp".contains(conversion) {
                bytes = 8;
            }
            let value = self.argument(arguments, &mut offset, bytes, lane)?;
            count += 1;
            let text = if conversion == 's' { self.text_at(value, lane)? } else { String::new() };
            spec.print(conversion, value, bytes, &text, &mut out);
        }
        Ok((out, count))
    }

    fn argument(&mut self, arguments: u64, offset: &mut u64, bytes: u64, lane: usize) -> Result<u64, Fault> {
        *offset = offset.next_multiple_of(bytes);
        let value = self.bytes_at(arguments.wrapping_add(*offset), bytes as usize, lane)?;
        *offset += bytes;
        Ok(read_word(&value))
    }
}

/// Flags, width and precision of a conversion.
#[derive(Debug, Default)]
struct Spec {
    flags: String,
    width: Option<i64>,
    precision: Option<i64>,
}

impl Spec {
    fn print(&self, conversion: char, value: u64, bytes: u64, text: &str, out: &mut String) {
        let has = |flag| self.flags.contains(flag);
        let precision = self.precision.map(|precision| precision.clamp(0, LONGEST_TEXT as i64) as usize);
        let sign = |negative: bool| match (negative, has('+'), has(' ')) {
            (true, ..) => "-",
            (_, true, _) => "+",
            (.., true) => " ",
            _ => "",
        };
        let at_least = |digits: String| format!("{digits:0>width$}", width = precision.unwrap_or(1));
        let (prefix, body) = match conversion {
            'd' | 'i' => {
                let value = if bytes == 4 { i64::from(value as i32) } else { value as i64 };
                (sign(value < 0).to_owned(), at_least(value.unsigned_abs().to_string()))
            }
            'u' => (String::new(), at_least(value.to_string())),
            'o' => (String::new(), at_least(format!("{value:o}"))),
            'x' => ((if has('#') && value != 0 { "0x" } else { "" }).to_owned(), at_least(format!("{value:x}"))),
            'X' => ((if has('#') && value != 0 { "0X" } else { "" }).to_owned(), at_least(format!("{value:X}"))),
            'p' => ("0x".to_owned(), format!("{value:x}")),
            'c' => (String::new(), char::from(value as u8).to_string()),
            's' => (String::new(), text.chars().take(precision.unwrap_or(usize::MAX)).collect()),
            'f' | 'F' | 'e' | 'E' | 'g' | 'G' | 'a' | 'A' => {
                let value = f64::from_bits(value);
                let text = float(conversion, value.abs(), precision);
                let text = if conversion.is_uppercase() { text.to_uppercase() } else { text };
                (sign(value.is_sign_negative() && !value.is_nan()).to_owned(), text)
            }
            other => (String::new(), format!("%{other}")),
        };
        let width = self.width.map_or(0, |width| width.unsigned_abs().min(LONGEST_TEXT as u64) as usize);
        let gap = width.saturating_sub(prefix.chars().count() + body.chars().count());
        let left = has('-') || self.width.is_some_and(|width| width < 0);
        let is_number = !matches!(conversion, 'c' | 's' | 'p');
        let zeros = has('0') && !left && is_number && (precision.is_none() || "fFeEgG".contains(conversion));
        let (before, inside, after) = match (left, zeros) {
            (true, _) => (0, 0, gap),
            (_, true) => (0, gap, 0),
            _ => (gap, 0, 0),
        };
        out.push_str(&" ".repeat(before));
        out.push_str(&prefix);
        out.push_str(&"0".repeat(inside));
        out.push_str(&body);
        out.push_str(&" ".repeat(after));
    }
}

/// A number that is not negative, as `%f`, `%e` or `%g` prints it. (`%a` is printed as `%e`.)
fn float(conversion: char, value: f64, precision: Option<usize>) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "nan" } else { "inf" }.to_owned();
    }
    let exponential = |precision: usize| {
        let text = format!("{value:.precision$e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        (digits.to_owned(), exponent)
    };
    let with_exponent =
        |digits: &str, exponent: i32| format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    match conversion.to_ascii_lowercase() {
        'f' => format!("{value:.*}", precision.unwrap_or(6)),
        'g' => {
            let significant = precision.unwrap_or(6).max(1);
            let (digits, exponent) = exponential(significant - 1);
            let trim = |text: &str| match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false => text.to_owned(),
            };
            if exponent < -4 || exponent >= significant as i32 {
                with_exponent(&trim(&digits), exponent)
            } else {
                trim(&format!("{value:.*}", (significant as i32 - 1 - exponent) as usize))
            }
        }
        _ => {
            let (digits, exponent) = exponential(precision.unwrap_or(6));
            with_exponent(&digits, exponent)
        }
    }
}

fn read_word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions() {
        let print = |flags: &str, width, precision, conversion, value: u64, bytes| {
            let mut out = String::new();
            Spec { flags: flags.to_owned(), width, precision }.print(conversion, value, bytes, "text", &mut out);
            out
        };
        assert_eq!(print("", None, None, 'd', 0xffff_ffff, 4), "-1");
        assert_eq!(print("0", Some(5), None, 'd', 0xffff_ffff, 4), "-0001");
        assert_eq!(print("-", Some(4), None, 'u', 7, 4), "7   ");
        assert_eq!(print("#", None, Some(4), 'x', 0xab, 4), "0x00ab");
        assert_eq!(print("", Some(6), Some(2), 's', 0, 8), "    te");
        let half = 0.5f64.to_bits();
        assert_eq!(print("", None, None, 'f', half, 8), "0.500000");
        assert_eq!(print("+", None, Some(1), 'e', (-1234.5f64).to_bits(), 8), "-1.2e+03");
        assert_eq!(print("", None, None, 'g', half, 8), "0.5");
        assert_eq!(print("", None, None, 'g', 1e-7f64.to_bits(), 8), "1e-07");
        assert_eq!(print("", None, None, 'g', 1e6f64.to_bits(), 8), "1e+06");
        assert_eq!(print("", None, None, 'f', f64::INFINITY.to_bits(), 8), "inf");
    }
}
