//! Barriers, fences, mbarriers, and the instructions that pause a warp.

use super::memory::take_scope;
use super::opcode::Opcode;
use super::operands::{expect_count, immediate, operand};
use super::{Decoded, Decoder};
use crate::ast::Operand;
use crate::check::Scope;
use crate::mbarrier_op::{MbarrierAction, MbarrierOp, WaitPhase};
use crate::program::{Barrier, BarrierReduction, Op, Space};

impl Decoder {
    pub(super) fn decode_synchronisation(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        match opcode.name() {
            "bar" | "barrier" => self.decode_barrier(opcode, operands),
            "mbarrier" => self.decode_mbarrier(opcode, operands),
            "fence" => self.decode_fence(opcode),
            "membar" => {
                let level = opcode.take_one(&["cta", "gl", "sys", "proxy"]).ok_or("the level is missing")?;
                let fence = |scope| Op::Fence { scope, sequential: true };
                self.push(match level {
                    "cta" => fence(Scope::Cta),
                    "gl" => fence(Scope::Gpu),
                    "sys" => fence(Scope::Sys),
                    _ => proxy_fence(opcode, &["alias", "async"])?,
                });
                Ok(())
            }
            "griddepcontrol" => {
                opcode.take_one(&["wait", "launch_dependents"]).ok_or("the action is missing")?;
                self.push(Op::Nothing);
                Ok(())
            }
            "nanosleep" => {
                opcode.take("u32");
                expect_count(operands, 1)?;
                let duration = self.read32(&operands[0])?;
                self.push(Op::Sleep(duration));
                Ok(())
            }
            _ => {
                let increase = opcode.take_one(&["inc", "dec"]).ok_or("`.inc` or `.dec` is missing")? == "inc";
                opcode.ignore(&["sync", "aligned", "u32"]);
                let count = immediate(operand(operands, 0)?)?;
                if !(24..=256).contains(&count) || count % 8 != 0 {
                    return Err(format!("{count} registers; it must be 24 to 256 and a multiple of 8"));
                }
                self.push(Op::MaxRegisters { count: count as u32, increase });
                Ok(())
            }
        }
    }

    /// Fences of memory release what the CTA has stored; those of proxies are for the checks.
    fn decode_fence(&mut self, opcode: &mut Opcode<'_>) -> Decoded<()> {
        if opcode.take("proxy") {
            let fence = proxy_fence(opcode, &["alias", "async", "async::generic", "tensormap::generic"])?;
            self.push(fence);
        } else if opcode.take("mbarrier_init") {
            opcode.ignore(&["release", "cluster"]);
            self.push(Op::FenceMbarrierInit);
        } else {
            let sequential = opcode.take_one(&["acq_rel", "sc", "acquire", "release"]) == Some("sc");
            opcode.ignore(&["sync_restrict::shared::cta", "sync_restrict::shared::cluster"]);
            let scope = take_scope(opcode).ok_or("the scope is missing")?;
            self.push(Op::Fence { scope, sequential });
        }
        Ok(())
    }

    fn decode_barrier(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        if opcode.take("warp") {
            if !opcode.take("sync") {
                return Err("`.sync` is missing".to_owned());
            }
            let members = self.read32(operand(operands, 0)?)?;
            self.push(Op::WarpBarrier(members));
            return Ok(());
        }
        if opcode.take("cluster") {
            return self.decode_cluster_barrier(opcode);
        }
        opcode.ignore(&["cta", "aligned"]);
        let action = opcode.take_one(&["sync", "arrive", "red"]).ok_or("`.sync`, `.arrive` or `.red` is missing")?;
        if action == "red" {
            return self.decode_barrier_reduction(opcode, operands);
        }
        let id = self.read32(operand(operands, 0)?)?;
        let threads = match operands.get(1) {
            Some(threads) => Some(self.read32(threads)?),
            None if action == "arrive" => return Err("the thread count is missing".to_owned()),
            None => None,
        };
        self.push(Op::Barrier(Box::new(Barrier { id, threads, arrive: action == "arrive", reduction: None })));
        Ok(())
    }

    fn decode_barrier_reduction(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let operation = opcode.take_one(&["popc", "and", "or"]).ok_or("the operation is missing")?;
        opcode.ignore(&["u32", "pred"]);
        let (id, threads, source) = match operands.len() {
            3 => (&operands[1], None, &operands[2]),
            4 => (&operands[1], Some(&operands[2]), &operands[3]),
            count => return Err(format!("3 or 4 operands expected, {count} found")),
        };
        let reduction = match operation {
            "popc" => BarrierReduction::Count(self.write(&operands[0])?),
            "and" => BarrierReduction::And(self.write_predicate(&operands[0])?),
            _ => BarrierReduction::Or(self.write_predicate(&operands[0])?),
        };
        let id = self.read32(id)?;
        let threads = threads.map(|threads| self.read32(threads)).transpose()?;
        let condition = self.condition(source)?;
        self.push(Op::Barrier(Box::new(Barrier {
            id,
            threads,
            arrive: false,
            reduction: Some((reduction, condition)),
        })));
        Ok(())
    }

    /// `arrive` releases unless it is `.relaxed`, `wait` acquires (PTX ISA 8.6, "barrier.cluster").
    fn decode_cluster_barrier(&mut self, opcode: &mut Opcode<'_>) -> Decoded<()> {
        let action = opcode.take_one(&["arrive", "wait"]).ok_or("`.arrive` or `.wait` is missing")?;
        let aligned = opcode.take("aligned");
        self.push(if action == "arrive" {
            Op::ClusterArrive { relaxed: opcode.take_one(&["release", "relaxed"]) == Some("relaxed"), aligned }
        } else {
            opcode.take("acquire");
            Op::ClusterWait { aligned }
        });
        Ok(())
    }

    fn decode_mbarrier(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        let name = opcode
            .take_one(&[
                "init",
                "inval",
                "arrive",
                "arrive_drop",
                "expect_tx",
                "complete_tx",
                "test_wait",
                "try_wait",
                "pending_count",
            ])
            .ok_or("the operation is missing")?;
        if name == "pending_count" {
            return self.decode_pending_count(opcode, operands);
        }
        let expects = matches!(name, "arrive" | "arrive_drop") && opcode.take("expect_tx");
        let no_complete = opcode.take("noComplete");
        let by_parity = opcode.take("parity");
        let relaxed = opcode.take_one(&["release", "acquire", "relaxed"]) == Some("relaxed");
        let scope = take_scope(opcode).unwrap_or(Scope::Cta);
        let space = match opcode.take_one(&["shared::cta", "shared::cluster", "shared"]) {
            None => Space::Generic,
            Some("shared::cluster") => Space::Cluster,
            Some(_) => Space::Shared,
        };
        opcode.take("b64");
        let remote = matches!(name, "arrive" | "arrive_drop" | "expect_tx" | "complete_tx") && !no_complete;
        if space == Space::Cluster && !remote {
            return Err("it works on mbarriers of the executing CTA only, not of shared::cluster".to_owned());
        }
        let (mut rest, mut state) = (operands, None);
        if matches!(name, "arrive" | "arrive_drop" | "test_wait" | "try_wait")
            && !matches!(operand(rest, 0)?, Operand::Address(_))
        {
            state = Some(&rest[0]);
            rest = &rest[1..];
        }
        let (address, _) = self.address(operand(rest, 0)?, space)?;
        let argument = rest.get(1);
        let need = || argument.ok_or("an operand is missing");
        let action = match name {
            "init" => MbarrierAction::Init { count: self.read32(need()?)? },
            "inval" => MbarrierAction::Invalidate,
            "expect_tx" => MbarrierAction::ExpectBytes { bytes: self.read32(need()?)? },
            "complete_tx" => MbarrierAction::CompleteBytes { bytes: self.read32(need()?)? },
            "arrive" | "arrive_drop" => {
                let state = match state {
                    Some(Operand::Name(name, 0)) if name == "_" => None,
                    Some(_) if space == Space::Cluster => {
                        return Err("an arrival of shared::cluster gives no state: it must be `_`".to_owned());
                    }
                    Some(state) => Some(self.write(state)?),
                    None => None,
                };
                let argument = match argument {
                    Some(argument) => Some(self.read32(argument)?),
                    None => None,
                };
                let one = self.constant32(1);
                if expects && argument.is_none() {
                    return Err("the byte count is missing".to_owned());
                }
                MbarrierAction::Arrive {
                    state,
                    count: if expects { one } else { argument.unwrap_or(one) },
                    expect_bytes: argument.filter(|_| expects),
                    drop: name == "arrive_drop",
                    no_complete,
                }
            }
            _ => {
                let done = self.write_predicate(state.ok_or("the result is missing")?)?;
                let phase = if by_parity {
                    WaitPhase::Parity(self.read32(need()?)?)
                } else {
                    WaitPhase::State(self.read(need()?, crate::ast::Type::B64)?)
                };
                let limit = match rest.get(2) {
                    Some(limit) => Some(self.read32(limit)?),
                    None => None,
                };
                MbarrierAction::Wait { done, phase, suspends: name == "try_wait", limit }
            }
        };
        self.push(Op::Mbarrier(Box::new(MbarrierOp { address, space, action, relaxed, scope })));
        Ok(())
    }

    fn decode_pending_count(&mut self, opcode: &mut Opcode<'_>, operands: &[Operand]) -> Decoded<()> {
        opcode.take("b64");
        let d: crate::registers::R32 = self.write(operand(operands, 0)?)?;
        let state: crate::registers::R64 = self.read(operand(operands, 1)?, crate::ast::Type::B64)?;
        self.push(super::operands::unary(d, state, |word| {
            crate::mbarrier::Mbarrier::decode(word).map_or(0, crate::mbarrier::Mbarrier::pending)
        }));
        Ok(())
    }
}

/// A fence of one of these proxies, and of the asynchronous one of some memory (PTX ISA 8.6, "membar, fence").
fn proxy_fence(opcode: &mut Opcode<'_>, proxies: &[&'static str]) -> Decoded<Op> {
    let one_way =
        |opcode: &mut Opcode<'_>| opcode.take_one(&["acquire", "release"]).ok_or("`.acquire` or `.release` is missing");
    Ok(match opcode.take_one(proxies).ok_or("the proxy is missing")? {
        "alias" => Op::Nothing,
        "async" => Op::FenceProxy(match opcode.take_one(&["global", "shared::cta", "shared::cluster"]) {
            None => Space::Generic,
            Some("global") => Space::Global,
            Some(_) => Space::Shared,
        }),
        "async::generic" => {
            let restriction = match one_way(opcode)? {
                "acquire" => "sync_restrict::shared::cluster",
                _ => "sync_restrict::shared::cta",
            };
            if !opcode.take(restriction) || !opcode.take("cluster") {
                return Err(format!("`.{restriction}.cluster` is missing"));
            }
            Op::FenceProxy(Space::Shared)
        }
        _ => {
            let release = one_way(opcode)? == "release";
            Op::FenceTensorMap { release, scope: take_scope(opcode).ok_or("the scope is missing")? }
        }
    })
}
