//! What the command does: buffers, tensor maps, launches, runs and results, step by step.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle};
use ptx_sim::{Arg, Cost, Launch, Machine, Module, RunOptions, SimError, TensorMap, TensorMapSpec};

use crate::files;
use crate::values::{Contents, Scalar, number, shape};

/// What a buffer starts with.
#[derive(Clone, Debug, PartialEq)]
pub struct Source(pub Contents);

impl FromStr for Source {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, value) =
            text.split_once(':').with_context(|| format!("`{text}` is not KIND:VALUE, as in u32s:5"))?;
        // `zeros:BYTES` or `zeros:TYPE:SHAPE`
        let sized = || -> Result<Contents> {
            let Some((scalar, dims)) = value.split_once(':') else {
                return Ok(Contents { bytes: number(value)?, ..Contents::default() });
            };
            let (scalar, shape): (Scalar, _) = (scalar.parse()?, shape(dims)?);
            let bytes = shape.iter().try_fold(scalar.bytes() as u64, |bytes, dim| bytes.checked_mul(*dim));
            Ok(Contents { data: None, bytes: bytes.context("it is too large")?, scalar: Some(scalar), shape })
        };
        Ok(Self(match kind {
            "new" => sized()?,
            "zeros" => {
                let contents = sized()?;
                Contents { data: Some(vec![0; usize::try_from(contents.bytes)?]), ..contents }
            }
            "file" => Contents::of(fs::read(value).with_context(|| format!("cannot read {value}"))?),
            "npy" => files::read_npy(Path::new(value))?,
            "safetensors" => {
                let (path, name) = value.rsplit_once(':').context("safetensors:PATH:TENSOR is expected")?;
                files::read_safetensors(Path::new(path), name)?
            }
            _ => {
                let scalar = kind.strip_suffix('s').and_then(|name| name.parse::<Scalar>().ok());
                let Some(scalar) = scalar else {
                    bail!(
                        "`{kind}` is no kind of contents; there are new, zeros, file, npy, safetensors, and lists: u32s, f32s, ..."
                    )
                };
                let data = scalar.parse_list(value)?;
                let count = (data.len() / scalar.bytes()) as u64;
                Contents { scalar: Some(scalar), shape: vec![count], ..Contents::of(data) }
            }
        }))
    }
}

/// `NAME[@DEVICE]=KIND:VALUE`.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedBuffer {
    pub name: String,
    pub device: usize,
    pub source: Source,
}

impl FromStr for NamedBuffer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, source) = text.split_once('=').with_context(|| format!("`{text}` is not NAME=KIND:VALUE"))?;
        let (name, device) = match name.split_once('@') {
            Some((name, device)) => (name, number(device)?),
            None => (name, 0),
        };
        Ok(Self { name: name.to_owned(), device, source: source.parse()? })
    }
}

/// `NAME=BUFFER[+OFFSET],shape=..,box=..[,strides=..][,swizzle=..][,type=..][,fill=..][,element-strides=..]`.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedMap {
    pub name: String,
    buffer: String,
    offset: u64,
    scalar: Option<Scalar>,
    spec: TensorMapSpec,
}

impl FromStr for NamedMap {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once('=').with_context(|| format!("`{text}` is not NAME=BUFFER,..."))?;
        let mut parts = rest.split(',');
        let place = parts.next().unwrap_or_default();
        let (buffer, offset) = match place.split_once('+') {
            Some((buffer, offset)) => (buffer, number(offset)?),
            None => (place, 0),
        };
        let (mut scalar, mut strides) = (None, None);
        let mut spec = TensorMapSpec {
            data_type: ptx_sim::tensor_map::TensorMapDataType::U8,
            global_address: 0,
            dims: vec![],
            strides: vec![],
            box_dims: vec![],
            element_strides: vec![],
            swizzle: Swizzle::None,
            fill: OutOfBoundsFill::Zero,
        };
        let small =
            |text: &str| shape(text)?.into_iter().map(|dim| Ok(u32::try_from(dim)?)).collect::<Result<Vec<_>>>();
        for part in parts {
            let (key, value) = part.split_once('=').with_context(|| format!("`{part}` is not KEY=VALUE"))?;
            match key {
                "shape" => spec.dims = shape(value)?,
                "box" => spec.box_dims = small(value)?,
                "strides" => strides = Some(shape(value)?),
                "element-strides" => spec.element_strides = small(value)?,
                "type" => scalar = Some(value.parse()?),
                "swizzle" => {
                    spec.swizzle = match value {
                        "none" | "0" => Swizzle::None,
                        "32" => Swizzle::B32,
                        "64" => Swizzle::B64,
                        "128" => Swizzle::B128,
                        _ => bail!("`{value}` is no swizzle; there are none, 32, 64 and 128"),
                    }
                }
                "fill" => {
                    spec.fill = match value {
                        "zero" => OutOfBoundsFill::Zero,
                        "nan" => OutOfBoundsFill::NaN,
                        _ => bail!("`{value}` is no fill; there are zero and nan"),
                    }
                }
                _ => bail!(
                    "`{key}` is not known; there are shape, box, strides, element-strides, type, swizzle and fill"
                ),
            }
        }
        ensure!(!spec.dims.is_empty() && !spec.box_dims.is_empty(), "`{text}` has no shape or no box");
        if spec.element_strides.is_empty() {
            spec.element_strides = vec![1; spec.dims.len()];
        }
        spec.strides = strides.unwrap_or_default();
        Ok(Self { name: name.to_owned(), buffer: buffer.to_owned(), offset, scalar, spec })
    }
}

/// A kernel parameter as the command line has it.
#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    Bytes(Vec<u8>),
    /// A pointer to a buffer of its own, which is named by the parameter's index.
    Buffer(Source),
    Pointer {
        buffer: String,
        offset: u64,
    },
    /// A tensor map by its 128 bytes, or a pointer to one.
    Map(String),
    MapPointer(String),
    Struct(Vec<Parameter>),
}

impl FromStr for Parameter {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, value) = text.split_once(':').with_context(|| format!("`{text}` is not KIND:VALUE, as in u32:5"))?;
        Ok(match kind {
            "ptr" => match value.split_once('+') {
                Some((buffer, offset)) => Self::Pointer { buffer: buffer.to_owned(), offset: number(offset)? },
                None => Self::Pointer { buffer: value.to_owned(), offset: 0 },
            },
            "map" => Self::Map(value.to_owned()),
            "mapptr" => Self::MapPointer(value.to_owned()),
            "hex" => {
                let digits: String = value.chars().filter(|c| !c.is_whitespace() && *c != '_').collect();
                ensure!(digits.len().is_multiple_of(2) && digits.is_ascii(), "`{value}` has half a byte");
                let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16);
                let bytes = (0..digits.len()).step_by(2).map(byte).collect::<Result<Vec<_>, _>>();
                Self::Bytes(bytes.with_context(|| format!("`{value}` is not hexadecimal"))?)
            }
            "struct" => Self::Struct(value.split(',').map(str::parse).collect::<Result<_>>()?),
            _ => match kind.parse::<Scalar>() {
                Ok(scalar) => Self::Bytes(scalar.parse(value)?),
                Err(error) => Self::Buffer(text.parse().with_context(|| {
                    format!("{error}; and ptr, map, mapptr, hex and struct, and a new buffer's contents")
                })?),
            },
        })
    }
}

/// `NAME:TYPE`.
#[derive(Clone, Debug, PartialEq)]
pub struct Show {
    pub name: String,
    scalar: Scalar,
}

impl FromStr for Show {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, scalar) = text.split_once(':').with_context(|| format!("`{text}` is not NAME:TYPE, as in 0:f32"))?;
        Ok(Self { name: name.to_owned(), scalar: scalar.parse()? })
    }
}

/// `NAME:PATH[:TYPE[:TOLERANCE]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct OnDisk {
    pub name: String,
    path: PathBuf,
    scalar: Option<Scalar>,
    tolerance: f64,
}

impl FromStr for OnDisk {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.splitn(4, ':');
        let (Some(name), Some(path)) = (parts.next(), parts.next()) else {
            bail!("`{text}` is not NAME:PATH");
        };
        let scalar = parts.next().map(str::parse).transpose()?;
        let tolerance = parts.next().map(number).transpose()?.unwrap_or(0.0);
        Ok(Self { name: name.to_owned(), path: path.into(), scalar, tolerance })
    }
}

/// Sizes along x, y and z.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dimensions(pub [u32; 3]);

impl FromStr for Dimensions {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut sizes = [1; 3];
        let parts: Vec<_> = text.split([',', 'x']).collect();
        ensure!(parts.len() <= 3, "`{text}` has more than three dimensions");
        for (size, part) in sizes.iter_mut().zip(parts) {
            *size = part.trim().parse().with_context(|| format!("`{part}` is not a number"))?;
        }
        Ok(Self(sizes))
    }
}

/// A launch as the command line has it.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct LaunchLine {
    /// The PTX.
    pub file: PathBuf,
    /// Kernel to run; not needed where there is only one.
    #[arg(long)]
    entry: Option<String>,
    /// Device that runs it.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// CTAs: x, x,y or x,y,z.
    #[arg(long, default_value = "1")]
    grid: Dimensions,
    /// CTAs of a cluster: x, x,y or x,y,z; what the kernel says if absent.
    #[arg(long, default_value = "1")]
    cluster: Dimensions,
    /// Threads of a CTA: x, x,y or x,y,z.
    #[arg(long, default_value = "32")]
    block: Dimensions,
    /// Dynamic shared memory of a CTA, in bytes.
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    shared: u32,
    /// A kernel parameter, in order. A value: `u32:N`, `f32:X` and so on (u8 to s64, f16, bf16, f32, f64, e4m3, e5m2), `hex:BYTES`,
    /// `struct:VALUE,VALUE,...`, `ptr:BUFFER[+OFFSET]`, `map:NAME`, `mapptr:NAME`. Or a pointer to a new buffer, which has the
    /// parameter's index as its name: `new:BYTES` or `new:TYPE:SHAPE` (uninitialised), `zeros:...`, `file:PATH`, `npy:PATH`,
    /// `safetensors:PATH:TENSOR`, `u32s:N,N,...`, `f32s:X,X,...` and so on.
    #[arg(long = "arg", value_name = "KIND:VALUE", allow_hyphen_values = true)]
    args: Vec<Parameter>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Buffer(NamedBuffer),
    Map(NamedMap),
    Launch(LaunchLine),
    Run,
    Show(Show),
    Save(OnDisk),
    Expect(OnDisk),
}

/// The modules of all launches.
pub struct Modules(HashMap<PathBuf, Module>);

/// Reads a module.
pub fn read(file: &Path) -> Result<Module> {
    let ptx = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Module::parse(&ptx).with_context(|| file.display().to_string())
}

impl Modules {
    pub fn of(steps: &[Step]) -> Result<Self> {
        let mut modules = HashMap::new();
        for step in steps {
            if let Step::Launch(line) = step
                && !modules.contains_key(&line.file)
            {
                modules.insert(line.file.clone(), read(&line.file)?);
            }
        }
        Ok(Self(modules))
    }

    fn get(&self, line: &LaunchLine) -> Result<(&Module, &str)> {
        let module = self.0.get(&line.file).context("the module was not read")?;
        let entries: Vec<_> = module.entries().collect();
        match (&line.entry, entries.as_slice()) {
            (Some(entry), _) => {
                let known = entries.into_iter().find(|known| known == entry);
                Ok((module, known.with_context(|| format!("no such entry `{entry}` in {}", line.file.display()))?))
            }
            (None, [only]) => Ok((module, *only)),
            (None, _) => {
                bail!("{} has the kernels {entries:?}: choose one with --entry", line.file.display())
            }
        }
    }
}

/// All results are of buffers that there are by then.
pub fn check_names(steps: &[Step]) -> Result<()> {
    let mut known: Vec<String> = Vec::new();
    for step in steps {
        let wanted = match step {
            Step::Buffer(buffer) => {
                known.push(buffer.name.clone());
                continue;
            }
            Step::Launch(line) => {
                let own = |(_, parameter): &(usize, &Parameter)| matches!(parameter, Parameter::Buffer(_));
                known.extend(line.args.iter().enumerate().filter(own).map(|(index, _)| index.to_string()));
                continue;
            }
            Step::Show(show) => &show.name,
            Step::Save(one) | Step::Expect(one) => &one.name,
            Step::Map(_) | Step::Run => continue,
        };
        ensure!(known.contains(wanted), "{} is no buffer; there are {known:?}", label(wanted));
    }
    Ok(())
}

/// A buffer while it exists.
struct Buffer {
    address: u64,
    bytes: u64,
    scalar: Option<Scalar>,
    shape: Vec<u64>,
}

/// One machine, with what it has.
pub struct Session<'a> {
    machine: Machine,
    modules: &'a Modules,
    options: RunOptions,
    buffers: HashMap<String, Buffer>,
    maps: HashMap<String, Vec<u8>>,
    launches: Vec<Launch<'a>>,
}

impl<'a> Session<'a> {
    pub fn new(devices: usize, modules: &'a Modules, options: RunOptions) -> Self {
        let (buffers, maps) = (HashMap::new(), HashMap::new());
        Self { machine: Machine::new(devices), modules, options, buffers, maps, launches: Vec::new() }
    }

    /// Does a step; false if a kernel has an error or a result is not what is expected.
    pub fn step(&mut self, step: &'a Step) -> Result<bool> {
        match step {
            Step::Buffer(buffer) => self.buffer(&buffer.name, buffer.device, &buffer.source)?,
            Step::Map(map) => self.map(map)?,
            Step::Launch(line) => self.launch(line)?,
            Step::Run => return self.run(),
            Step::Show(show) => {
                let contents = self.contents(&show.name)?;
                let words = contents.chunks_exact(show.scalar.bytes()).map(|bytes| show.scalar.show(bytes));
                println!("{}: {}", label(&show.name), words.collect::<Vec<_>>().join(" "));
            }
            Step::Save(save) => self.save(save)?,
            Step::Expect(expected) => return self.expect(expected),
        }
        Ok(true)
    }

    fn buffer(&mut self, name: &str, device: usize, source: &Source) -> Result<()> {
        let Source(contents) = source;
        let address = self.machine.alloc(device, contents.bytes.max(1), &label(name))?;
        if let Some(data) = &contents.data {
            self.machine.write(address, data)?;
        }
        let (scalar, shape) = (contents.scalar, contents.shape.clone());
        let known = self.buffers.insert(name.to_owned(), Buffer { address, bytes: contents.bytes, scalar, shape });
        ensure!(known.is_none(), "there are two buffers `{name}`");
        Ok(())
    }

    fn find(&self, name: &str) -> Result<&Buffer> {
        self.buffers.get(name).with_context(|| format!("{} is no buffer", label(name)))
    }

    fn map(&mut self, map: &NamedMap) -> Result<()> {
        let buffer = self.find(&map.buffer)?;
        let scalar = map.scalar.or(buffer.scalar).with_context(|| format!("tensor map `{}` has no type", map.name))?;
        let mut spec = map.spec.clone();
        spec.data_type = scalar.of_tensor_map()?;
        spec.global_address = buffer.address + map.offset;
        if spec.strides.is_empty() {
            // Packed.
            let mut stride = scalar.bytes() as u64;
            for dim in &spec.dims[..spec.dims.len() - 1] {
                stride *= dim;
                spec.strides.push(stride);
            }
        }
        let bytes = TensorMap::encode(&spec).with_context(|| format!("tensor map `{}`", map.name))?;
        self.maps.insert(map.name.clone(), bytes.to_vec());
        Ok(())
    }

    fn map_bytes(&self, name: &str) -> Result<&Vec<u8>> {
        self.maps.get(name).with_context(|| format!("there is no tensor map `{name}`"))
    }

    fn launch(&mut self, line: &'a LaunchLine) -> Result<()> {
        let (module, entry) = self.modules.get(line)?;
        let mut args = Vec::new();
        for (index, parameter) in line.args.iter().enumerate() {
            args.push(Arg::Bytes(self.argument(line.device, &index.to_string(), parameter)?));
        }
        let (grid, cluster, block) = (line.grid.0, line.cluster.0, line.block.0);
        let device = line.device;
        self.launches.push(Launch { device, module, entry, grid, cluster, block, shared_bytes: line.shared, args });
        Ok(())
    }

    fn argument(&mut self, device: usize, name: &str, parameter: &Parameter) -> Result<Vec<u8>> {
        let pointer = |address: u64| address.to_le_bytes().to_vec();
        Ok(match parameter {
            Parameter::Bytes(bytes) => bytes.clone(),
            Parameter::Buffer(source) => {
                self.buffer(name, device, source)?;
                pointer(self.find(name)?.address)
            }
            Parameter::Pointer { buffer, offset } => pointer(self.find(buffer)?.address + offset),
            Parameter::Map(map) => self.map_bytes(map)?.clone(),
            Parameter::MapPointer(map) => {
                let bytes = self.map_bytes(map)?.clone();
                let address = self.machine.alloc(device, 128, map)?;
                self.machine.write(address, &bytes)?;
                pointer(address)
            }
            Parameter::Struct(parts) => {
                let (mut bytes, mut align) = (Vec::new(), 1);
                for (index, part) in parts.iter().enumerate() {
                    let value = self.argument(device, &format!("{name}.{index}"), part)?;
                    // As C lays it out: each part on a multiple of its size, a tensor map on one of 64.
                    let wanted = if value.len() == 128 { 64 } else { (value.len().max(1)).next_power_of_two().min(16) };
                    bytes.resize(bytes.len().next_multiple_of(wanted), 0);
                    bytes.extend(value);
                    align = align.max(wanted);
                }
                bytes.resize(bytes.len().next_multiple_of(align), 0);
                bytes
            }
        })
    }

    fn run(&mut self) -> Result<bool> {
        let launches = std::mem::take(&mut self.launches);
        let (seed, result) = (self.options.seed, self.machine.run(&launches, &self.options));
        print!("{}", self.machine.take_printed());
        let reports = self.machine.take_reports();
        let names: Vec<_> = launches.iter().map(|launch| launch.entry).collect();
        let names = names.join(", ");
        for report in &reports {
            eprintln!("{names}, seed {seed}: {report}");
        }
        match result {
            Ok(costs) => {
                for (launch, cost) in launches.iter().zip(&costs) {
                    print_cost(launch.entry, seed, cost);
                }
                Ok(reports.is_empty())
            }
            Err(error @ SimError::Launch { .. }) => Err(error.into()),
            Err(error) => {
                eprintln!("{names}, seed {seed}: {error}");
                eprintln!("repeat it with the same arguments and --seed {seed} --seeds 1");
                Ok(false)
            }
        }
    }

    fn contents(&mut self, name: &str) -> Result<Vec<u8>> {
        let (address, bytes) = self.find(name).map(|buffer| (buffer.address, buffer.bytes))?;
        let mut contents = vec![0; usize::try_from(bytes)?];
        self.machine.read(address, &mut contents).with_context(|| label(name))?;
        Ok(contents)
    }

    /// A buffer's elements, with a type, and a shape that fits.
    fn elements(&mut self, on_disk: &OnDisk) -> Result<(Vec<u8>, Scalar, Vec<u64>)> {
        let contents = self.contents(&on_disk.name)?;
        let buffer = self.find(&on_disk.name)?;
        let scalar = on_disk.scalar.or(buffer.scalar);
        let scalar = scalar.with_context(|| format!("the type of {} is not known", label(&on_disk.name)))?;
        let count = contents.len() as u64 / scalar.bytes() as u64;
        let fits = !buffer.shape.is_empty() && buffer.shape.iter().product::<u64>() == count;
        let shape = if fits { buffer.shape.clone() } else { vec![count] };
        Ok((contents, scalar, shape))
    }

    fn save(&mut self, save: &OnDisk) -> Result<()> {
        let file = if save.path.extension().is_some_and(|extension| extension == "npy") {
            let (contents, scalar, shape) = self.elements(save)?;
            files::npy(&contents, scalar, &shape)
        } else {
            self.contents(&save.name)?
        };
        fs::write(&save.path, file).with_context(|| format!("cannot write {}", save.path.display()))
    }

    /// Compares a buffer with an `.npy`; says what differs most.
    fn expect(&mut self, expected: &OnDisk) -> Result<bool> {
        let (contents, scalar, _) = self.elements(expected)?;
        let wanted = files::read_npy(&expected.path)?;
        let (Some(data), Some(theirs)) = (&wanted.data, wanted.scalar) else {
            bail!("{} has no elements", expected.path.display());
        };
        let (count, there) = (contents.len() / scalar.bytes(), data.len() / theirs.bytes());
        ensure!(count == there, "{} has {count} elements, {} {there}", label(&expected.name), expected.path.display());
        let pairs = contents.chunks_exact(scalar.bytes()).zip(data.chunks_exact(theirs.bytes()));
        let pairs = pairs.map(|(ours, other)| (scalar.value(ours), theirs.value(other)));
        let difference = |(ours, other): (f64, f64)| match ours.is_nan() && other.is_nan() || ours == other {
            true => 0.0,
            false if (ours - other).is_nan() => f64::INFINITY,
            false => (ours - other).abs(),
        };
        let worst = pairs.enumerate().map(|(index, pair)| (difference(pair), index, pair));
        let Some((most, index, (ours, other))) = worst.max_by(|one, two| one.0.total_cmp(&two.0)) else {
            return Ok(true);
        };
        let path = expected.path.display();
        if most > expected.tolerance {
            eprintln!("{} differs from {path}: element {index} is {ours}, {other} expected", label(&expected.name));
            return Ok(false);
        }
        println!("{} is as in {path}, within {most}", label(&expected.name));
        Ok(true)
    }
}

/// What a buffer is called in messages.
fn label(name: &str) -> String {
    if name.starts_with(|c: char| c.is_ascii_digit()) { format!("parameter {name}") } else { name.to_owned() }
}

fn print_cost(entry: &str, seed: u64, cost: &Cost) {
    println!(
        "{entry}, seed {seed}: {} warp instructions ({} thread instructions), {} tensor-core operations, \
         {} B read and {} B written in device memory, {} B through L2, {} waits, {} ns simulated",
        cost.instructions,
        cost.thread_instructions,
        cost.tensor_ops,
        cost.hbm_read,
        cost.hbm_write,
        cost.l2_bytes,
        cost.waits,
        cost.simulated_ns
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let parse = |text: &str| text.parse::<Parameter>().map_err(|error| format!("{error:#}"));
        assert_eq!(parse("u32:7"), Ok(Parameter::Bytes(vec![7, 0, 0, 0])));
        assert_eq!(parse("f32:-1.5"), Ok(Parameter::Bytes((-1.5f32).to_le_bytes().to_vec())));
        assert_eq!(parse("hex:0a_ff"), Ok(Parameter::Bytes(vec![10, 255])));
        assert_eq!(parse("ptr:x+16"), Ok(Parameter::Pointer { buffer: "x".into(), offset: 16 }));
        let Ok(Parameter::Buffer(Source(zeros))) = parse("zeros:f32:2x3") else { panic!("no buffer") };
        assert_eq!((zeros.bytes, zeros.shape), (24, vec![2, 3]));
        let Ok(Parameter::Buffer(Source(words))) = parse("u32s:1, 256") else { panic!("no buffer") };
        assert_eq!(words.data, Some(vec![1, 0, 0, 0, 0, 1, 0, 0]));
        for (text, expected) in [
            ("7", "KIND:VALUE"),
            ("i8:1", "no type"),
            ("u32:-1", "does not fit"),
            ("f32s:1,x", "`x`"),
            ("hex:1", "half"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn dimensions() {
        assert_eq!("8".parse::<Dimensions>().unwrap(), Dimensions([8, 1, 1]));
        assert_eq!("8,2,3".parse::<Dimensions>().unwrap(), Dimensions([8, 2, 3]));
        assert!("1,2,3,4".parse::<Dimensions>().is_err());
        assert!("".parse::<Dimensions>().is_err());
    }
}
