//! `ferromoe trace`.

use std::io::{self, Write};

use anyhow::{Result, bail};
use ferromoe::bench::{self, BenchShape, MACHINES, Plan, Traced};
use ferromoe::cuda::Gpu;
use ferromoe::trace::{Summary, Trace};
use ferromoe::{Device, DeviceGroup, SimOptions};

use super::args::{MeasureOn, TraceArgs};
use super::output::Target;
use super::print;

/// Records a launch, writes it, and prints where its time went.
pub fn trace(args: &TraceArgs) -> Result<()> {
    args.run.check_machine()?;
    let output = Target::find(&args.output)?;
    let svg = args.svg.as_deref().map(Target::find).transpose()?;
    if let Some(svg) = &svg {
        output.refuse_same(svg, "--svg")?;
    }
    let gpus = args.run.device.gpus(args.run.ranks)?;
    if args.sms.is_some() && (gpus.is_some() || args.run.device == MeasureOn::Model) {
        bail!("--sms is the size of a simulated rank, and nothing is simulated; add --device sim, or leave it out");
    }
    let shown = match &gpus {
        _ if args.run.device == MeasureOn::Model => model(args)?,
        Some(gpus) => record(args, args.shape, Device::Cuda, gpus)?,
        None => {
            let sms = args.sms.unwrap_or(SimOptions::default().sms);
            let device = Device::Sim(SimOptions { sms, ..SimOptions::default() });
            record(args, args.shape.scaled_down(args.run.ranks), device, &[])?
        }
    };
    // What was recorded is written first: a reader of the tables that has gone away costs nothing of it.
    if let Some(svg) = &svg {
        write(svg, |out| out.write_all(shown.trace.svg(&shown.title).as_bytes()))?;
    }
    write(&output, |out| shown.trace.write_json(&shown.title, out))?;
    print::text(&tables(&shown))
}

fn tables(shown: &Shown) -> String {
    let Shown { title, note, plan, trace } = shown;
    let mut text = format!("{title}\n{note}\n");
    if !trace.one_clock {
        text += "the ranks' clocks do not agree: each rank's times begin at its own first CTA\n";
    }
    let tables = trace.ranks.iter().map(|rank| Summary::new(rank, plan.shape.hidden, plan.shape.intermediate));
    text + &tables.map(|table| format!("\n{table}")).collect::<Vec<_>>().join("\n")
}

fn write(target: &Target, contents: impl FnOnce(&mut io::BufWriter<&std::fs::File>) -> io::Result<()>) -> Result<()> {
    target.write(contents)?;
    eprintln!("wrote {}", target.path().display());
    Ok(())
}

/// What is shown, and how its times came about.
struct Shown {
    title: String,
    note: String,
    plan: Plan,
    trace: Trace,
}

fn record(args: &TraceArgs, shape: BenchShape, device: Device, gpus: &[Gpu]) -> Result<Shown> {
    let plan = args.run.plan(shape, &[args.tokens]);
    let Traced { setting, trace, launches, us } =
        bench::traced(&plan, &DeviceGroup::open_traced(device, args.run.ranks)?, gpus)?;
    let note = match us {
        Some(us) => format!(
            "{us:.1} us from one launch's end to the next, tracing included; the last of {} launches",
            launches + 1
        ),
        None => "times are steps of the simulator, not a model of a GPU: they show order, not duration".into(),
    };
    Ok(Shown { title: title(args, &plan, &setting.device), note, plan, trace })
}

fn model(args: &TraceArgs) -> Result<Shown> {
    let plan = args.run.plan(args.shape, &[args.tokens]);
    let machine = args.run.machine.unwrap_or(MACHINES[0]);
    let found = bench::modelled(&plan, &machine, args.run.ranks)?.remove(0);
    let note =
        format!("a model, not a measurement (docs/performance.md); it names as the bottleneck: {}", found.bottleneck);
    let title = title(args, &plan, &format!("a modelled {}", machine.name));
    Ok(Shown { title, note, plan, trace: found.trace })
}

fn title(args: &TraceArgs, plan: &Plan, device: &str) -> String {
    let BenchShape { name, hidden, intermediate, top_k, shared_experts, .. } = plan.shape;
    format!(
        "{name} in {}: hidden {hidden}, intermediate {intermediate}, top-{top_k}, {shared_experts} shared, {} experts on {} rank{}, {} \
         routing, {} tokens a rank, on {device}",
        plan.format.name(),
        plan.experts,
        args.run.ranks,
        if args.run.ranks == 1 { "" } else { "s" },
        plan.choice,
        args.tokens
    )
}
