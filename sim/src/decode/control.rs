//! Branches, calls and exits.

use super::opcode::Opcode;
use super::operands::{expect_count, operand};
use super::scope::Symbol;
use super::{Decoded, Decoder};
use crate::ast::Operand;
use crate::program::Op;
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
            Some(Symbol::Function(index)) => index,
            Some(Symbol::Register(Register::R64(address))) => {
                return self.decode_indirect_call(address, returns, arguments);
            }
            _ if name == "vprintf" || name == "__assertfail" => {
                return Err("there is no host to print to".to_owned());
            }
            _ => return Err(format!("there is no function `{name}`")),
        };
        let info = self.functions[index as usize].clone();
        if info.parameters.len() != arguments.len() || info.returns.len() != returns.len() {
            return Err(format!(
                "`{name}` takes {} parameters and gives {} results",
                info.parameters.len(),
                info.returns.len()
            ));
        }
        for (argument, (place, bytes)) in arguments.iter().zip(&info.parameters) {
            let from = self.local_place(argument)?;
            self.copy_local(from, *place, *bytes);
        }
        self.push(Op::Call(index));
        for (result, (place, bytes)) in returns.iter().zip(&info.returns) {
            let to = self.local_place(result)?;
            self.copy_local(*place, to, *bytes);
        }
        Ok(())
    }

    fn decode_indirect_call(&mut self, address: R64, returns: &[Operand], arguments: &[Operand]) -> Decoded<()> {
        if !returns.is_empty() || !arguments.is_empty() {
            return Err("indirect calls with parameters are not supported".to_owned());
        }
        self.push(Op::CallIndirect(address));
        Ok(())
    }

    fn local_place(&self, operand: &Operand) -> Decoded<u32> {
        match operand {
            Operand::Name(name, 0) => match self.scopes.find(name) {
                Some(Symbol::Local(place)) => Ok(place),
                _ => Err(format!("`{name}` is not a call parameter")),
            },
            other => Err(format!("{other:?} is not a call parameter")),
        }
    }

    /// Padding of a parameter need not be written, so this is a copy and not a load and a store.
    fn copy_local(&mut self, from: u32, to: u32, bytes: u32) {
        self.push(Op::CopyLocal { from, to, bytes });
    }
}
