//! The driver's functions.

use crate::state::{CURRENT, Capture, Fake, Object, Queued, SMS, code, run};
use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType};
use ptx_sim::{Module, TensorMap, TensorMapSpec};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

/// A handle or device address: a number, as wide as the pointer that the caller takes it for.
type Handle = u64;

/// Defines exports that run their body on the fake's state.
macro_rules! exports {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) |$fake:ident| $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> u32 {
                run(stringify!($name), |$fake| $body)
            }
        )*
    };
}

/// Writes through a pointer of the caller's.
fn put<T>(place: *mut T, value: T) -> Result<(), u32> {
    if place.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: by the driver API's contract it is a place for a `T`.
    unsafe { place.write(value) };
    Ok(())
}

/// Reads `count` values of the caller's.
fn get<T: Copy>(values: *const T, count: usize) -> Vec<T> {
    // SAFETY: by the driver API's contract there are so many.
    (0..count).map(|index| unsafe { values.add(index).read() }).collect()
}

fn text(pointer: *const c_char) -> String {
    // SAFETY: by the driver API's contract it is NUL-terminated.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

exports! {
    fn cuInit(flags: c_uint) |fake| {
        fake.initialised = flags == 0;
        match (flags, fake.gpus) {
            (0, 0) => Err(code::NO_DEVICE),
            (0, _) => Ok(()),
            _ => Err(code::INVALID_VALUE),
        }
    }
    fn cuDeviceGetCount(count: *mut c_int) |fake| { put(count, fake.gpus) }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |fake| { put(device, fake.device(ordinal)?) }
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) |fake| {
        fake.device(device)?;
        for (index, &byte) in b"Fake GPU\0".iter().take(length as usize).enumerate() {
            // SAFETY: the caller's buffer has `length` bytes.
            put(unsafe { name.add(index) }, byte as c_char)?;
        }
        Ok(())
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) |fake| {
        fake.device(device)?;
        match attribute {
            16 => put(value, SMS),
            75 => put(value, fake.capability.0),
            76 => put(value, fake.capability.1),
            _ => Err(code::INVALID_VALUE),
        }
    }
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) |fake| {
        let pair = (fake.device(device)?, fake.device(peer)?);
        fake.note(&format!("gpu={device} peer={peer}"));
        put(can, (device != peer && !fake.no_peer.contains(&pair)).into())
    }

    // Contexts: a primary context's handle is its GPU's ordinal plus one.
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) |fake| {
        *fake.retained.entry(fake.device(device)?).or_default() += 1;
        fake.note(&format!("gpu={device}"));
        put(context, device as Handle + 1)
    }
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) |fake| {
        fake.note(&format!("gpu={device}"));
        match fake.retained.get_mut(&device) {
            Some(count) if *count > 0 => *count -= 1,
            _ => return Err(code::INVALID_CONTEXT),
        }
        Ok(())
    }
    fn cuCtxGetCurrent(context: *mut Handle) |_fake| { put(context, CURRENT.get().map_or(0, |gpu| gpu as Handle + 1)) }
    fn cuCtxSetCurrent(context: Handle) |fake| {
        let gpu = if context == 0 { None } else { Some(fake.device(context as i32 - 1)?) };
        CURRENT.set(gpu);
        Ok(())
    }
    fn cuCtxEnablePeerAccess(peer: Handle, flags: c_uint) |fake| {
        let pair = (fake.current()?, fake.device(peer as i32 - 1)?);
        fake.note(&format!("gpu={} peer={}", pair.0, pair.1));
        match () {
            _ if flags != 0 || pair.0 == pair.1 => Err(code::INVALID_VALUE),
            _ if fake.no_peer.contains(&pair) => Err(code::PEER_ACCESS_UNSUPPORTED),
            _ if !fake.peers.insert(pair) => Err(code::PEER_ACCESS_ALREADY_ENABLED),
            _ => Ok(()),
        }
    }

    fn cuModuleLoadDataEx(
        module_place: *mut Handle,
        image: *const c_char,
        options: c_uint,
        names: *const c_uint,
        values: *const *mut c_void,
    ) |fake| {
        let gpu = fake.current()?;
        fake.note(&format!("gpu={gpu}"));
        let ptx = text(image);
        let module = match Module::parse(&ptx) {
            Ok(module) => Arc::new(module),
            Err(error) => {
                let names = get(names, options as usize);
                let options = names.into_iter().zip(get(values, options as usize)).collect();
                write_log(&options, format!("fake ptxas: {error}\0").as_bytes())?;
                return Err(code::INVALID_PTX);
            }
        };
        let handle = fake.add(Object::Module { gpu, module, entries: entries(&ptx) });
        put(module_place, handle)
    }
    fn cuModuleUnload(module: Handle) |fake| {
        if let Some(Object::Module { gpu, .. }) = fake.objects.get(&module) {
            let note = format!("gpu={gpu} current={}", fake.current().map_or("none".into(), |gpu| gpu.to_string()));
            fake.note(&note);
        }
        fake.remove(module, |object| matches!(object, Object::Module { .. }))
    }
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) |fake| {
        let name = text(name);
        fake.note(&name);
        let Some(Object::Module { gpu, module, entries }) = fake.objects.get(&module) else {
            return Err(code::INVALID_HANDLE);
        };
        let (gpu, module, args) = (*gpu, module.clone(), entries.get(&name).ok_or(code::NOT_FOUND)?.clone());
        let handle = fake.add(Object::Function { gpu, module, entry: name, args, shared_bytes: 48 << 10 });
        put(function, handle)
    }
    fn cuFuncSetAttribute(function: Handle, attribute: c_uint, value: c_int) |fake| {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_uint = 8;
        const HOPPER_LIMIT: c_int = 227 << 10;
        fake.note(&format!("attribute={attribute} value={value}"));
        match fake.objects.get_mut(&function) {
            Some(Object::Function { shared_bytes, .. }) => match (attribute, value) {
                (MAX_DYNAMIC_SHARED_SIZE_BYTES, 0..=HOPPER_LIMIT) => *shared_bytes = value as u32,
                _ => return Err(code::INVALID_VALUE),
            },
            _ => return Err(code::INVALID_HANDLE),
        }
        Ok(())
    }

    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int) |fake| {
        let gpu = fake.current()?;
        fake.note(&format!("gpu={gpu} flags={flags} priority={priority}"));
        let handle = fake.add(Object::Stream { gpu, capture: None });
        put(stream, handle)
    }
    fn cuStreamGetCtx(stream: Handle, context: *mut Handle) |fake| {
        let gpu = fake.stream_gpu(stream)?;
        put(context, gpu as Handle + 1)
    }
    fn cuStreamSynchronize(stream: Handle) |fake| {
        let gpu = fake.stream_gpu(stream)?;
        fake.note(&format!("gpu={gpu} {}", if stream == 0 { "default" } else { "own" }));
        fake.not_capturing()?;
        fake.drain()
    }
    fn cuStreamDestroy_v2(stream: Handle) |fake| {
        fake.remove(stream, |object| matches!(object, Object::Stream { .. }))
    }
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) |fake| {
        const GLOBAL: c_uint = 0;
        fake.note(&format!("mode={mode}"));
        let thread = (mode != GLOBAL).then(|| std::thread::current().id());
        match fake.objects.get_mut(&stream) {
            Some(Object::Stream { capture: capture @ None, .. }) => {
                *capture = Some(Capture { thread, launches: Vec::new() });
            }
            _ => return Err(code::INVALID_HANDLE),
        }
        Ok(())
    }
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) |fake| {
        let launches = match fake.objects.get_mut(&stream) {
            Some(Object::Stream { capture, .. }) => capture.take().ok_or(code::INVALID_VALUE)?.launches,
            _ => return Err(code::INVALID_HANDLE),
        };
        let handle = fake.add(Object::Graph { launches });
        put(graph, handle)
    }
    fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) |fake| {
        let Some(Object::Graph { launches }) = fake.objects.get(&graph) else { return Err(code::INVALID_HANDLE) };
        let launches = launches.clone();
        fake.note(&format!("flags={flags} launches={}", launches.len()));
        let handle = fake.add(Object::GraphExec { launches });
        put(exec, handle)
    }
    fn cuGraphLaunch(exec: Handle, stream: Handle) |fake| {
        fake.stream_gpu(stream)?;
        let Some(Object::GraphExec { launches }) = fake.objects.get(&exec) else { return Err(code::INVALID_HANDLE) };
        for launch in launches.clone() {
            fake.note(&launch.describe());
            fake.queue(Queued { stream, ..launch });
        }
        Ok(())
    }
    fn cuGraphExecDestroy(exec: Handle) |fake| {
        fake.remove(exec, |object| matches!(object, Object::GraphExec { .. }))
    }
    fn cuGraphDestroy(graph: Handle) |fake| {
        fake.remove(graph, |object| matches!(object, Object::Graph { .. }))
    }

    fn cuEventCreate(event: *mut Handle, flags: c_uint) |fake| {
        let gpu = fake.current()?;
        fake.note(&format!("gpu={gpu} flags={flags}"));
        let handle = fake.add(Object::Event { gpu, recorded: false });
        put(event, handle)
    }
    fn cuEventRecord(event: Handle, stream: Handle) |fake| {
        let stream_gpu = fake.stream_gpu(stream)?;
        match fake.objects.get_mut(&event) {
            Some(Object::Event { gpu, recorded }) if *gpu == stream_gpu => *recorded = true,
            _ => return Err(code::INVALID_HANDLE),
        }
        fake.note(&format!("gpu={stream_gpu}"));
        Ok(())
    }
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, stop: Handle) |fake| {
        for event in [start, stop] {
            match fake.objects.get(&event) {
                Some(Object::Event { recorded: true, .. }) => {}
                _ => return Err(code::INVALID_HANDLE),
            }
        }
        put(milliseconds, 1.5)
    }
    fn cuEventDestroy_v2(event: Handle) |fake| {
        fake.remove(event, |object| matches!(object, Object::Event { .. }))
    }

    fn cuMemAlloc_v2(address: *mut Handle, bytes: usize) |fake| {
        let gpu = fake.current()?;
        fake.note(&format!("gpu={gpu} bytes={bytes}"));
        fake.not_capturing()?;
        let allocated = fake.alloc(gpu, bytes)?;
        put(address, allocated)
    }
    fn cuMemFree_v2(address: Handle) |fake| {
        fake.free(address)
    }
    fn cuMemcpyHtoD_v2(to: Handle, from: *const u8, bytes: usize) |fake| {
        fake.current()?;
        fake.note(&format!("bytes={bytes}"));
        fake.not_capturing()?;
        let from = get(from, bytes);
        fake.memory(|machine| machine.write(to, &from))
    }
    fn cuMemcpyDtoH_v2(to: *mut u8, from: Handle, bytes: usize) |fake| {
        fake.current()?;
        fake.note(&format!("bytes={bytes}"));
        fake.not_capturing()?;
        // SAFETY: by the driver API's contract `to` has so many bytes, and they are the caller's.
        let to = unsafe { std::slice::from_raw_parts_mut(to, bytes) };
        fake.memory(|machine| machine.read(from, to))
    }
    fn cuMemsetD8_v2(address: Handle, value: u8, bytes: usize) |fake| {
        fake.current()?;
        fake.note(&format!("value={value} bytes={bytes}"));
        fake.not_capturing()?;
        fake.memory(|machine| machine.fill(address, bytes as u64, value))
    }

    fn cuIpcGetMemHandle(handle: *mut [u8; 64], address: Handle) |fake| {
        fake.current()?;
        match fake.objects.get(&address) {
            Some(Object::Memory { .. }) => {}
            _ => return Err(code::INVALID_VALUE),
        }
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        put(handle, bytes)
    }
    fn cuIpcOpenMemHandle_v2(address: *mut Handle, handle: IpcMemHandle, flags: c_uint) |fake| {
        const LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
        let gpu = fake.current()?;
        let [a, b, c, d, e, f, g, h, ..] = handle.0;
        let exported = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let Some(Object::Memory { gpu: owner, .. }) = fake.objects.get(&exported) else { return Err(code::INVALID_VALUE) };
        let owner = *owner;
        fake.note(&format!("gpu={gpu} owner={owner}"));
        if flags != LAZY_ENABLE_PEER_ACCESS || fake.no_peer.contains(&(gpu, owner)) {
            return Err(code::PEER_ACCESS_UNSUPPORTED);
        }
        let mapped = fake.add(Object::IpcMapping);
        put(address, mapped)
    }
    fn cuIpcCloseMemHandle(address: Handle) |fake| {
        fake.remove(address, |object| matches!(object, Object::IpcMapping))
    }

    fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        params: *const *const u8,
        extra: *const *const c_void,
    ) |fake| {
        const CLUSTER_DIMENSION: c_uint = 4;
        // SAFETY: by the driver API's contract it points to a configuration.
        let config = unsafe { config.read() };
        let Some(Object::Function { gpu, module, entry, args, shared_bytes }) = fake.objects.get(&function) else {
            return Err(code::INVALID_HANDLE);
        };
        let threads: u32 = config.block.iter().product();
        let ctas: u32 = config.grid.iter().product();
        if ctas == 0 || threads == 0 || threads > 1024 || config.shared_bytes > *shared_bytes || !extra.is_null() {
            return Err(code::INVALID_VALUE);
        }
        let mut launch = Queued {
            stream: config.stream,
            gpu: *gpu,
            module: module.clone(),
            entry: entry.clone(),
            grid: config.grid,
            cluster: [1, 1, 1],
            block: config.block,
            shared_bytes: config.shared_bytes,
            args: get(params, args.len()).into_iter().zip(args).map(|(arg, &bytes)| get(arg, bytes).to_vec()).collect(),
        };
        if [fake.stream_gpu(config.stream)?, fake.current()?] != [launch.gpu; 2] {
            return Err(code::INVALID_HANDLE);
        }
        fake.note(&launch.describe());
        for attribute in get(config.attributes, config.attribute_count as usize) {
            fake.note(&format!("attribute {}={}", attribute.id, attribute.value[0]));
            match attribute.id {
                CLUSTER_DIMENSION => launch.cluster.copy_from_slice(&attribute.value[..3]),
                _ => return Err(code::INVALID_VALUE),
            }
        }
        fake.queue(launch);
        Ok(())
    }

    fn cuTensorMapEncodeTiled(
        map: *mut [u8; 128],
        data_type: c_uint,
        rank: c_uint,
        address: Handle,
        dims: *const u64,
        strides: *const u64,
        tile: *const c_uint,
        element_strides: *const c_uint,
        interleave: c_uint,
        swizzle: c_uint,
        promotion: c_uint,
        fill: c_uint,
    ) |fake| {
        let rank = rank as usize;
        if !(map as usize).is_multiple_of(64) || !(1..=5).contains(&rank) || (interleave, fill) != (0, 0) || promotion > 3 {
            return Err(code::INVALID_VALUE);
        }
        let spec = TensorMapSpec {
            data_type: match data_type {
                0 => TensorMapDataType::U8,
                9 => TensorMapDataType::Bf16,
                _ => return Err(code::INVALID_VALUE),
            },
            global_address: address,
            dims: get(dims, rank),
            strides: get(strides, rank - 1),
            box_dims: get(tile, rank),
            element_strides: get(element_strides, rank),
            swizzle: match swizzle {
                0 => Swizzle::None,
                1 => Swizzle::B32,
                2 => Swizzle::B64,
                3 => Swizzle::B128,
                _ => return Err(code::INVALID_VALUE),
            },
            fill: OutOfBoundsFill::Zero,
        };
        fake.note(&format!("{spec:?}"));
        put(map, TensorMap::encode(&spec).map_err(|_| code::INVALID_VALUE)?)
    }
}

/// Gives names to the codes that tests inject; not calls that can fail, so they are not counted.
fn describe(code: c_uint) -> Option<(&'static CStr, &'static CStr)> {
    Some(match code {
        code::INVALID_VALUE => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        code::OUT_OF_MEMORY => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        code::INVALID_PTX => (c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
        code::NOT_FOUND => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        700 => (c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
        _ => return None,
    })
}

/// The name of a code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: c_uint, text: *mut *const c_char) -> u32 {
    let name = describe(code).map(|(name, _)| name.as_ptr());
    name.map_or(Err(code::INVALID_VALUE), |name| put(text, name)).err().unwrap_or(0)
}

/// The description of a code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: c_uint, text: *mut *const c_char) -> u32 {
    let description = describe(code).map(|(_, description)| description.as_ptr());
    description.map_or(Err(code::INVALID_VALUE), |name| put(text, name)).err().unwrap_or(0)
}

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcMemHandle([u8; 64]);

/// `CUlaunchAttribute` with an integer value.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    value: [c_uint; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    attribute_count: c_uint,
}

/// Name and sizes of the parameters, in bytes, of every entry of a PTX text: arrays of bytes, and `.u64`.
fn entries(ptx: &str) -> BTreeMap<String, Vec<usize>> {
    ptx.split(".entry ")
        .skip(1)
        .filter_map(|rest| {
            let (name, rest) = rest.split_once('(')?;
            let (params, _) = rest.split_once(')')?;
            let bytes =
                |param: &str| match param.split_once(".b8").and_then(|(_, array)| array.split(['[', ']']).nth(1)) {
                    Some(bytes) => bytes.parse().unwrap_or(0),
                    None => 8,
                };
            Some((name.trim().to_owned(), params.split(".param").skip(1).map(bytes).collect()))
        })
        .collect()
}

/// Writes the PTX compiler's log where the JIT options say.
fn write_log(options: &BTreeMap<c_uint, *mut c_void>, log: &[u8]) -> Result<(), u32> {
    const ERROR_LOG_BUFFER: c_uint = 5;
    const ERROR_LOG_BUFFER_SIZE_BYTES: c_uint = 6;
    let (Some(&buffer), Some(&size)) = (options.get(&ERROR_LOG_BUFFER), options.get(&ERROR_LOG_BUFFER_SIZE_BYTES))
    else {
        return Ok(());
    };
    for (index, &byte) in log.iter().take(size as usize).enumerate() {
        // SAFETY: the buffer has the size that the options say.
        put(unsafe { buffer.cast::<u8>().add(index) }, byte)?;
    }
    Ok(())
}

impl Fake {
    /// The GPU of a stream; the default stream is the current context's.
    fn stream_gpu(&self, stream: Handle) -> Result<i32, u32> {
        match self.objects.get(&stream) {
            _ if stream == 0 => self.current(),
            Some(Object::Stream { gpu, .. }) => Ok(*gpu),
            _ => Err(code::INVALID_HANDLE),
        }
    }

    /// What a thread may not call while it captures a stream, or any thread does in capture mode global.
    fn not_capturing(&self) -> Result<(), u32> {
        let this = std::thread::current().id();
        let capturing = |object: &Object| match object {
            Object::Stream { capture: Some(capture), .. } => capture.thread.is_none_or(|thread| thread == this),
            _ => false,
        };
        if self.objects.values().any(capturing) { Err(code::CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    fn remove(&mut self, handle: Handle, is: impl Fn(&Object) -> bool) -> Result<(), u32> {
        match self.objects.get(&handle).is_some_and(is) {
            true => self.objects.remove(&handle).map(|_| ()).ok_or(code::INVALID_HANDLE),
            false => Err(code::INVALID_HANDLE),
        }
    }
}
