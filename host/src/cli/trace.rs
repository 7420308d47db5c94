//! `ferromoe trace`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use ferromoe::bench::{self, BenchShape, Plan, Traced};
use ferromoe::cuda::{Gpu, find_gpus};
use ferromoe::trace::Summary;
use ferromoe::{Device, DeviceGroup, Error, Result, SimOptions};

use super::args::{DeviceArg, TraceArgs};

/// Records a launch, writes it, and prints where its time went.
pub fn trace(args: &TraceArgs) -> Result<()> {
    let gpus = match args.device {
        DeviceArg::Sim => None,
        DeviceArg::Cuda => Some(find_gpus(args.ranks)?),
        DeviceArg::Auto => find_gpus(args.ranks).ok(),
    };
    // A path that cannot be written is told before the launch.
    let output = create(&args.output)?;
    let svg = args.svg.as_deref().map(|path| create(path).map(|file| (path, file))).transpose()?;
    let traced = match &gpus {
        Some(gpus) => record(args, args.shape, Device::Cuda, gpus)?,
        None => {
            let sms = args.sms.unwrap_or(SimOptions::default().sms);
            let device = Device::Sim(SimOptions { sms, ..SimOptions::default() });
            record(args, args.shape.scaled_down(args.ranks), device, &[])?
        }
    };
    let title = title(&traced);
    println!("{title}");
    match traced.us {
        Some(us) => println!(
            "{us:.1} us from one launch's end to the next, tracing included; the last of {} launches",
            traced.launches + 1
        ),
        None => println!("times are steps of the simulator, not a model of a GPU: they show order, not duration"),
    }
    if !traced.trace.one_clock {
        println!("the ranks' clocks do not agree: each rank's times begin at its own first CTA");
    }
    for rank in &traced.trace.ranks {
        println!("\n{}", Summary::new(rank, traced.setting.hidden, traced.setting.intermediate));
    }
    if let Some((path, file)) = svg {
        write(path, file, |out| out.write_all(traced.trace.svg(&title).as_bytes()))?;
    }
    write(&args.output, output, |out| traced.trace.write_json(&title, out))
}

fn record(args: &TraceArgs, shape: BenchShape, device: Device, gpus: &[Gpu]) -> Result<Traced> {
    let experts = args
        .experts_per_rank
        .map_or_else(|| shape.experts_on(args.ranks), |experts| experts.saturating_mul(args.ranks));
    let plan = Plan { shape, experts, choice: args.routing.into(), tokens: vec![args.tokens] };
    bench::traced(&plan, &DeviceGroup::open_traced(device, args.ranks)?, gpus)
}

fn title(traced: &Traced) -> String {
    let setting = &traced.setting;
    format!(
        "{}: hidden {}, intermediate {}, top-{}, {} shared, {} experts on {} ranks, {:?} routing, {} tokens a rank, on {}",
        setting.shape,
        setting.hidden,
        setting.intermediate,
        setting.top_k,
        setting.shared_experts,
        setting.experts,
        setting.ranks,
        setting.routing,
        setting.tokens,
        setting.device
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
