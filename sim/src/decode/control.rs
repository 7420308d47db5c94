//! Branches, calls and exits.

use super::opcode::Opcode;
use super::operands::{expect_count, operand};
use super::scope::Symbol;
use super::{Decoded, Decoder};
use crate::ast::Operand;
use crate::program::{Guard, HostFunction, IndirectCall, Op};
use crate::registers::{R64, Register};

impl Decoder {
    pub(super) fn decode_control(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        opcode.take("uni");
        match opcode.name() {
            "bra" => {
                expect_count(operands, 1)?;
                let label = self.label(&operands[0])?;
                self.push(Op::Branch(label));
            }
            "brx" => self.decode_branch_index(opcode, operands)?,
            "call" => self.decode_call(operands)?,
            "ret" => self.push(if self.is_entry { Op::Exit } else { Op::Return }),
            "exit" => self.push(Op::Exit),
            "pmevent" => self.push(Op::Nothing),
            _ => self.push(Op::Trap),
        }
        Ok(())
    }

    fn label(&self, operand: &Operand) -> Decoded<u32> {
        match operand {
            Operand::Name(name, 0) => match self.scopes.find(name) {
                Some(Symbol::Label(label)) => Ok(label),
                _ => Err(format!("there is no label `{name}`")),
            },
            other => Err(format!("{other:?} is not a label")),
        }
    }

    fn decode_branch_index(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 2)?;
        opcode.take("idx");
        let index = self.read32(&operands[0])?;
        let Operand::Name(table, 0) = &operands[1] else {
            return Err("the branch target list is missing".to_owned());
        };
        let names = self
            .branch_tables
            .get(table)
            .cloned()
            .ok_or_else(|| format!("there is no branch target list `{table}`"))?;
        let targets = names.into_iter().map(|name| self.label(&Operand::Name(name, 0))).collect::<Decoded<_>>()?;
        self.push(Op::BranchIndex { index, targets });
        Ok(())
    }

    /// `call (ret), function, (parameters)[, prototype]`: parameters are copied from the caller's local memory
    /// to the callee's before, and the results back after.
    fn decode_call(&mut self, operands: &[Operand]) -> Decoded<()> {
        let mut rest = operands;
        let mut returns: &[Operand] = &[];
        if let Some(Operand::List(list)) = rest.first() {
            returns = list;
            rest = &rest[1..];
        }
        let callee = operand(rest, 0)?;
        let arguments: &[Operand] = match rest.get(1) {
            Some(Operand::List(list)) => list,
            _ => &[],
        };
        let Operand::Name(name, 0) = callee else {
            return Err(format!("{callee:?} cannot be called"));
        };
        let index = match self.scopes.find(name) {
            Some(Symbol::Register(Register::R64(address))) => {
                return self.decode_indirect_call(address, returns, arguments);
            }
            _ if name == "vprintf" || name == "__assertfail" => return self.decode_host_call(name, returns, arguments),
            Some(Symbol::Function(index)) => index,
            _ => return Err(format!("there is no function `{name}`")),
        };
        if !self.bodies.contains(name) {
            return Err(format!("`{name}` is called but has no body"));
        }
        let info = self.functions[index as usize].clone();
        if info.parameters.len() != arguments.len() || info.returns.len() != returns.len() {
            return Err(format!(
                "`{name}` takes {} parameters and gives {} results",
                info.parameters.len(),
                info.returns.len()
            ));
        }
        let arguments = self.local_places(arguments)?;
        let results = self.local_places(returns)?;
        let ahead = self.save_frame(Some(index as usize));
        for ((from, _), (place, bytes)) in arguments.iter().zip(&info.parameters) {
            self.copy_local(*from, *place, *bytes);
        }
        self.push(Op::Call(index));
        for ((to, _), (place, bytes)) in results.iter().zip(&info.returns) {
            self.copy_local(*place, *to, *bytes);
        }
        self.restore_frame(ahead, results);
        Ok(())
    }

    /// Before a call that may lead back to the function that makes it, sets aside what belongs to that; lanes that the guard
    /// excludes go around all of it, for the guard may have another value afterwards. Gives the label behind.
    fn save_frame(&mut self, callee: Option<usize>) -> Option<Option<u32>> {
        if !self.calls.may_return(self.current, callee) {
            return None;
        }
        let mut behind = None;
        if let Some(guard) = self.guard {
            self.labels.push(None);
            let label = self.labels.len() as u32 - 1;
            self.guard = Some(Guard { negate: !guard.negate, ..guard });
            self.push(Op::Branch(label));
            self.guard = None;
            behind = Some(label);
        }
        self.push(Op::SaveFrame(self.current as u32));
        Some(behind)
    }

    fn restore_frame(&mut self, saved: Option<Option<u32>>, results: Vec<(u32, u32)>) {
        let Some(behind) = saved else {
            return;
        };
        self.push(Op::RestoreFrame { frame: self.current as u32, results: results.into() });
        if let Some(label) = behind {
            self.labels[label as usize] = Some(self.module.code.len() as u32);
        }
    }

    fn decode_indirect_call(&mut self, address: R64, returns: &[Operand], arguments: &[Operand]) -> Decoded<()> {
        let (arguments, results) = (self.local_places(arguments)?, self.local_places(returns)?);
        let saved = self.save_frame(None);
        self.push(Op::CallIndirect(Box::new(IndirectCall {
            address,
            arguments: arguments.into(),
            results: results.clone().into(),
        })));
        self.restore_frame(saved, results);
        Ok(())
    }

    fn decode_host_call(&mut self, name: &str, returns: &[Operand], arguments: &[Operand]) -> Decoded<()> {
        let (which, sizes): (_, &[u32]) = match name {
            "vprintf" => (HostFunction::Print, &[8, 8]),
            _ => (HostFunction::Assert, &[8, 8, 4, 8, 8]),
        };
        let arguments = self.local_places(arguments)?;
        let results = self.local_places(returns)?;
        let fits =
            arguments.len() == sizes.len() && arguments.iter().zip(sizes).all(|((_, bytes), size)| bytes >= size);
        if !fits || results.len() > 1 || results.iter().any(|(_, bytes)| *bytes < 4) {
            return Err(format!("`{name}` does not take these parameters"));
        }
        self.push(Op::HostCall {
            which,
            arguments: arguments.iter().map(|(place, _)| *place).collect(),
            result: results.first().map(|(place, _)| *place),
        });
        Ok(())
    }

    /// Call parameters: places in local memory, and bytes.
    fn local_places(&self, operands: &[Operand]) -> Decoded<Vec<(u32, u32)>> {
        let place = |operand: &Operand| match operand {
            Operand::Name(name, 0) => match self.scopes.find(name) {
                Some(Symbol::Local { place, bytes }) => Ok((place, bytes)),
                _ => Err(format!("`{name}` is not a call parameter")),
            },
            other => Err(format!("{other:?} is not a call parameter")),
        };
        operands.iter().map(place).collect()
    }

    /// Padding of a parameter need not be written, so this is a copy and not a load and a store.
    fn copy_local(&mut self, from: u32, to: u32, bytes: u32) {
        self.push(Op::CopyLocal { from, to, bytes });
    }
}
