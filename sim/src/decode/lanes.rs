//! Instructions in which the lanes of a warp work together.

use super::opcode::Opcode;
use super::operands::{expect_count, operand};
use super::{Decoded, Decoder};
use crate::ast::Operand;
use crate::program::*;
use crate::registers::R32;

impl Decoder {
    pub(super) fn decode_lanes(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let name = opcode.name();
        if name == "activemask" {
            opcode.take("b32");
            expect_count(operands, 1)?;
            let d = self.write(&operands[0])?;
            self.push(Op::ActiveMask(d));
            return Ok(());
        }
        if !opcode.take("sync") {
            return Err("only the `.sync` form exists since sm_70".to_owned());
        }
        match name {
            "shfl" => self.decode_shuffle(opcode, operands),
            "vote" => self.decode_vote(opcode, operands),
            "match" => self.decode_match(opcode, operands),
            "redux" => self.decode_redux(opcode, operands),
            _ => self.decode_elect(operands),
        }
    }

    fn decode_shuffle(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 5)?;
        let mode = match opcode.take_one(&["up", "down", "bfly", "idx"]) {
            Some("up") => ShuffleMode::Up,
            Some("down") => ShuffleMode::Down,
            Some("bfly") => ShuffleMode::Butterfly,
            Some(_) => ShuffleMode::Index,
            None => return Err("the mode is missing".to_owned()),
        };
        opcode.need_type()?;
        let (destination, in_range) = match &operands[0] {
            Operand::Pair(value, predicate) => (self.write(value)?, Some(self.write_predicate(predicate)?)),
            value => (self.write(value)?, None),
        };
        let shuffle = Shuffle {
            mode,
            destination,
            in_range,
            source: self.read32(&operands[1])?,
            lane: self.read32(&operands[2])?,
            clamp: self.read32(&operands[3])?,
            members: self.read32(&operands[4])?,
        };
        self.push(Op::Shuffle(Box::new(shuffle)));
        Ok(())
    }

    fn decode_vote(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 3)?;
        let mode = match opcode.take_one(&["all", "any", "uni", "ballot"]) {
            Some("all") => VoteMode::All,
            Some("any") => VoteMode::Any,
            Some("uni") => VoteMode::Uniform,
            Some(_) => VoteMode::Ballot,
            None => return Err("the mode is missing".to_owned()),
        };
        opcode.ignore(&["pred", "b32"]);
        let result = if mode == VoteMode::Ballot {
            VoteResult::Mask(self.write(&operands[0])?)
        } else {
            VoteResult::Predicate(self.write_predicate(&operands[0])?)
        };
        let condition = self.condition(&operands[1])?;
        let members = self.read32(&operands[2])?;
        self.push(Op::Vote { mode, result, condition, members });
        Ok(())
    }

    fn decode_match(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 3)?;
        let require_all = opcode.take_one(&["any", "all"]).ok_or("the mode is missing")? == "all";
        let kind = opcode.need_type()?;
        let (destination, all) = match &operands[0] {
            Operand::Pair(value, predicate) => (self.write(value)?, Some(self.write_predicate(predicate)?)),
            value => (self.write(value)?, None),
        };
        let value = self.source(&operands[1], kind)?;
        let members = self.read32(&operands[2])?;
        self.push(Op::Match { destination, all, require_all, value, members });
        Ok(())
    }

    fn decode_redux(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 3)?;
        let name = opcode.take_one(&["add", "min", "max", "and", "or", "xor"]).ok_or("the operation is missing")?;
        let kind = opcode.need_type()?;
        if kind.is_float() {
            return Err(format!("type {kind:?}"));
        }
        let signed = kind.is_signed();
        let operation = match name {
            "add" => Reduction::Add,
            "min" => Reduction::Min { signed },
            "max" => Reduction::Max { signed },
            "and" => Reduction::And,
            "or" => Reduction::Or,
            _ => Reduction::Xor,
        };
        let destination: R32 = self.write(&operands[0])?;
        let source = self.read(&operands[1], kind)?;
        let members = self.read32(&operands[2])?;
        self.push(Op::Reduce { operation, destination, source, members });
        Ok(())
    }

    fn decode_elect(&mut self, operands: &[Operand]) -> Decoded<()> {
        expect_count(operands, 2)?;
        let Operand::Pair(leader, elected) = operand(operands, 0)? else {
            return Err("`leader|predicate` is expected".to_owned());
        };
        let leader = self.write(leader)?;
        let elected = self.write_predicate(elected)?;
        let members = self.read32(&operands[1])?;
        self.push(Op::Elect { leader, elected, members });
        Ok(())
    }
}
