//! `ferromoe trace`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use ferromoe::bench::{self, BenchShape, MACHINES, Plan, Traced};
use ferromoe::cuda::Gpu;
use ferromoe::trace::{Summary, Trace};
use ferromoe::{Device, DeviceGroup, Error, Result, SimOptions};

use super::args::{MeasureOn, TraceArgs};

/// Records a launch, writes it, and prints where its time went.
pub fn trace(args: &TraceArgs) -> Result<()> {
    let gpus = args.run.device.gpus(args.run.ranks)?;
    // A path that cannot be written is told before the launch.
    let output = create(&args.output)?;
    let svg = args.svg.as_deref().map(|path| create(path).map(|file| (path, file))).transpose()?;
    let shown = match &gpus {
        _ if args.run.device == MeasureOn::Model => model(args)?,
        Some(gpus) => record(args, args.shape, Device::Cuda, gpus)?,
        None => {
            let sms = args.sms.unwrap_or(SimOptions::default().sms);
            let device = Device::Sim(SimOptions { sms, ..SimOptions::default() });
            record(args, args.shape.scaled_down(args.run.ranks), device, &[])?
        }
    };
    let Shown { title, note, plan, trace } = shown;
    println!("{title}\n{note}");
    if !trace.one_clock {
        println!("the ranks' clocks do not agree: each rank's times begin at its own first CTA");
    }
    for rank in &trace.ranks {
        println!("\n{}", Summary::new(rank, plan.shape.hidden, plan.shape.intermediate));
    }
    if let Some((path, file)) = svg {
        write(path, file, |out| out.write_all(trace.svg(&title).as_bytes()))?;
    }
    write(&args.output, output, |out| trace.write_json(&title, out))
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
        "{name}: hidden {hidden}, intermediate {intermediate}, top-{top_k}, {shared_experts} shared, {} experts on {} rank{}, {:?} \
         routing, {} tokens a rank, on {device}",
        plan.experts,
        args.run.ranks,
        if args.run.ranks == 1 { "" } else { "s" },
        plan.choice,
        args.tokens
    )
}

fn create(path: &Path) -> Result<File> {
    File::create(path).map_err(|source| Error::Io { action: "write", path: path.into(), source })
}

fn write(path: &Path, file: File, text: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let mut out = BufWriter::new(file);
    text(&mut out).and_then(|()| out.flush()).map_err(|source| Error::Io {
        action: "write",
        path: path.into(),
        source,
    })?;
    eprintln!("wrote {}", path.display());
    Ok(())
}
