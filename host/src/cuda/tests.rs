//! The whole host path against the fake driver (`tests/fake-driver`).

use super::driver;
use super::{CapturedGraph, CudaBackend, CudaError, Gpu, find_gpus, share_gpu};
use crate::backend::{Backend, RankLaunch};
use crate::config::MoeConfig;
use crate::error::Error;
use crate::fused::{FusedMoe, RankInputs};
use crate::group::{Device, DeviceGroup, SimOptions};
use crate::memory::DeviceBuffer;
use crate::rendezvous::{Member, Rendezvous, RendezvousAddress};
use crate::testing::{EngineRank, Tokens, layer, small_config};
use crate::weights::ExpertWeights;
use crate::workspace::{Workspace, WorkspaceSizes};
use cust::stream::{Stream, StreamFlags};
use libloading::Library;
use ptx_sim::TensorMapSpec;
use ptx_sim::tensor_map::{OutOfBoundsFill, Swizzle, TensorMapDataType};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

const PTX: &str = ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry moe(\n.param .u64 a,\n.param .u64 b\n)\n{ ret; }\n";

/// `CUDA_ERROR_LAUNCH_FAILED`.
const LAUNCH_FAILED: u32 = 719;

/// The fake driver, reset, and nobody else's until this is dropped.
struct FakeDriver {
    library: &'static Library,
    _alone: MutexGuard<'static, ()>,
}

impl FakeDriver {
    fn with(gpus: i32, capability: i32) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        let alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Cargo builds it, as a dev-dependency, next to this test.
        let path: PathBuf = std::env::current_exe().unwrap().with_file_name("libfake_cuda_driver.so");
        driver::load(Some(&path)).unwrap();
        // SAFETY: the fake driver's initialisers do nothing.
        let library = LIBRARY.get_or_init(|| unsafe { Library::new(&path) }.unwrap());
        let fake = Self { library, _alone: alone };
        // SAFETY: the signature is that of the fake's export.
        unsafe { (fake.library.get::<unsafe extern "C" fn(i32, i32)>("fake_reset").unwrap())(gpus, capability) };
        fake
    }

    fn fail(&self, call: i64, code: u32) {
        // SAFETY: the signature is that of the fake's export.
        unsafe { (self.library.get::<unsafe extern "C" fn(i64, u32)>("fake_fail").unwrap())(call, code) };
    }

    /// Fails a call of the calling thread.
    fn fail_own(&self, call: u64, code: u32) {
        // SAFETY: the signature is that of the fake's export.
        unsafe { (self.library.get::<unsafe extern "C" fn(u64, u32)>("fake_fail_own").unwrap())(call, code) };
    }

    fn forbid_peer(&self, from: i32, to: i32) {
        // SAFETY: the signature is that of the fake's export.
        unsafe { (self.library.get::<unsafe extern "C" fn(i32, i32)>("fake_forbid_peer").unwrap())(from, to) };
    }

    fn text(&self, export: &str) -> String {
        // SAFETY: the signature is that of the fake's export.
        let copy = unsafe { self.library.get::<unsafe extern "C" fn(*mut u8, usize) -> usize>(export) }.unwrap();
        let mut text = vec![0; 1 << 20];
        // SAFETY: the buffer is as long as said.
        let length = unsafe { copy(text.as_mut_ptr(), text.len()) };
        text.truncate(length);
        String::from_utf8(text).unwrap()
    }

    fn calls(&self) -> Vec<String> {
        self.text("fake_calls").lines().map(str::to_owned).collect()
    }

    /// The calls of one function, each with what it was called with.
    fn calls_of(&self, name: &str) -> Vec<String> {
        self.calls().into_iter().filter(|call| call.split(' ').next() == Some(name)).collect()
    }

    fn live(&self) -> String {
        self.text("fake_live")
    }
}

fn launch(rank: usize, args: &[u64]) -> RankLaunch<'_> {
    RankLaunch {
        rank,
        entry: "moe",
        grid: [132, 1, 1],
        block: [384, 1, 1],
        shared_bytes: 220 << 10,
        params: &[],
        args,
        cluster: 1 + rank as u32,
    }
}

/// Everything that a layer does with a backend, on two ranks.
fn whole_path() -> Result<(), Error> {
    let backend: Arc<dyn Backend> = Arc::new(CudaBackend::open(find_gpus(2)?)?);
    backend.prepare("moe", PTX, 220 << 10)?;
    let buffers: Vec<DeviceBuffer> = (0..2)
        .map(|rank| DeviceBuffer::new(&backend, rank, 4096 + rank as u64, "symmetric buffer"))
        .collect::<Result<_, _>>()?;
    let weights = DeviceBuffer::with(&backend, 1, &[7; 512], "weights")?;
    backend.fill(0, buffers[0].address() + 16, 32, 9)?;
    let mut back = [0; 48];
    backend.read(0, buffers[0].address() + 16, &mut back[..32])?;
    backend.read(1, weights.address(), &mut back[32..])?;
    assert_eq!(back[..32], [9; 32]);
    assert_eq!(back[32..], [7; 16]);
    assert_ne!(backend.encode_tensor_map(&weights_map(weights.address()))?, [0; 128]);
    let reports = backend.launch(&[launch(0, &[1, 2]), launch(1, &[3, 4])])?;
    assert_eq!(reports.iter().map(|report| report.elapsed).collect::<Vec<_>>(), [Duration::from_micros(1500); 2]);
    Ok(())
}

/// Runs `work` for every rank of a group of processes, which here are threads.
fn processes(ranks: usize, work: impl Fn(Gpu, Rendezvous) -> Result<(), Error> + Sync) -> Vec<Result<(), Error>> {
    let folder = tempfile::tempdir().unwrap();
    let address = RendezvousAddress::Unix(folder.path().join("group"));
    let process = |rank| {
        let member = Member { rank, ranks, digest: [0; 32] };
        let others = Rendezvous::join(&address, member, Duration::from_secs(20))?;
        work(find_gpus(ranks)?.remove(rank), others)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || process(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What a layer does to share a buffer with the ranks of other processes.
fn several_processes(ranks: usize) -> Vec<Result<(), Error>> {
    processes(ranks, |gpu, others| {
        let rank = others.member().rank;
        let backend: Arc<dyn Backend> = Arc::new(CudaBackend::open_process(gpu, others)?);
        assert_eq!((backend.ranks(), backend.local_ranks()), (ranks, rank..rank + 1));
        let buffer = DeviceBuffer::new(&backend, rank, 4096, "symmetric buffer")?;
        let addresses = backend.share(&[buffer.address()], "symmetric buffer")?;
        assert_eq!(addresses.len(), ranks);
        assert_eq!(addresses[rank], buffer.address());
        backend.encode_tensor_map(&weights_map(buffer.address()))?;
        backend.prepare("moe", PTX, 220 << 10)?;
        backend.launch(&[launch(rank, &addresses[..2])])?;
        Ok(())
    })
}

fn weights_map(address: u64) -> TensorMapSpec {
    TensorMapSpec {
        data_type: TensorMapDataType::Bf16,
        global_address: address,
        dims: vec![64, 4],
        strides: vec![128],
        box_dims: vec![64, 4],
        element_strides: vec![1, 1],
        swizzle: Swizzle::B128,
        fill: OutOfBoundsFill::Zero,
    }
}

/// The failed call within whatever wraps it.
fn failed_call(error: &Error) -> Option<&'static str> {
    let mut error: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut found = None;
    while let Some(inner) = error {
        let cuda = match inner.downcast_ref::<Error>() {
            Some(Error::Cuda(cuda)) => Some(cuda),
            _ => inner.downcast_ref::<CudaError>(),
        };
        match cuda {
            Some(CudaError::Call { call, .. }) => found = Some(*call),
            Some(CudaError::Ptx { source, .. }) => {
                if let CudaError::Call { call, .. } = **source {
                    found = Some(call);
                }
            }
            _ => {}
        }
        error = inner.source();
    }
    found
}

#[test]
fn the_whole_path_makes_the_calls_in_order_and_releases_everything() {
    let fake = FakeDriver::with(3, 9);
    whole_path().unwrap();
    assert_eq!(fake.live(), "");

    let calls = fake.calls();
    assert_eq!(calls[0], "cuInit");
    assert_eq!(
        fake.calls_of("cuDevicePrimaryCtxRetain"),
        ["cuDevicePrimaryCtxRetain gpu=0", "cuDevicePrimaryCtxRetain gpu=1"],
        "only as many GPUs as ranks"
    );
    assert_eq!(
        fake.calls_of("cuCtxEnablePeerAccess"),
        ["cuCtxEnablePeerAccess gpu=0 peer=1", "cuCtxEnablePeerAccess gpu=1 peer=0"]
    );
    assert_eq!(
        fake.calls_of("cuMemAlloc_v2"),
        ["cuMemAlloc_v2 gpu=0 bytes=4096", "cuMemAlloc_v2 gpu=1 bytes=4097", "cuMemAlloc_v2 gpu=1 bytes=512"]
    );
    assert_eq!(fake.calls_of("cuFuncSetAttribute"), ["cuFuncSetAttribute attribute=8 value=225280"; 2]);
    assert_eq!(
        fake.calls_of("cuLaunchKernelEx"),
        [
            "cuLaunchKernelEx gpu=0 moe grid=[132, 1, 1] block=[384, 1, 1] shared=225280 args=[1, 2]",
            "cuLaunchKernelEx gpu=1 moe grid=[132, 1, 1] block=[384, 1, 1] shared=225280 args=[3, 4] attribute 4=2",
        ]
    );

    assert_eq!(fake.calls_of("cuModuleUnload"), ["cuModuleUnload gpu=0 current=0", "cuModuleUnload gpu=1 current=1"]);

    // From the first launch to the last nothing waits.
    let position = |wanted: &str| calls.iter().position(|call| call.starts_with(wanted)).unwrap();
    let last = calls.iter().rposition(|call| call.starts_with("cuLaunchKernelEx")).unwrap();
    let between = &calls[position("cuLaunchKernelEx")..last];
    assert!(between.iter().all(|call| !call.contains("Synchronize") && !call.contains("Memcpy")), "{between:?}");
    // Every write and fill is waited for: another rank's kernel is not ordered after it.
    for (at, call) in calls.iter().enumerate() {
        if call.starts_with("cuMemcpyHtoD") || call.starts_with("cuMemsetD8") {
            assert!(calls[at + 1].starts_with("cuStreamSynchronize"), "{call} then {}", calls[at + 1]);
        }
    }
}

#[test]
fn every_call_that_fails_becomes_our_error_with_its_name_and_leaks_nothing() {
    const ILLEGAL_ADDRESS: u32 = 700;
    // Younger than `cust`: it must come through all the same.
    const INVALID_CLUSTER_SIZE: u32 = 912;
    let fake = FakeDriver::with(2, 9);
    whole_path().unwrap();
    let calls = fake.calls();
    drop(fake);
    assert!(calls.len() > 80, "{calls:#?}");
    let mut reported = 0;
    for (index, call) in calls.iter().enumerate() {
        let name = call.split(' ').next().unwrap();
        for code in [ILLEGAL_ADDRESS, INVALID_CLUSTER_SIZE] {
            let fake = FakeDriver::with(2, 9);
            fake.fail(index as i64, code);
            let result = whole_path();
            assert_eq!(fake.live(), "", "after call {index}, {call}, failed: {:#?}", fake.calls());
            match result {
                Err(error) => {
                    reported += 1;
                    assert_eq!(failed_call(&error), Some(name), "{error}");
                    assert!(error.to_string().contains(&code.to_string()), "{error}");
                }
                Ok(()) => check_reported(Ok(()), name),
            }
        }
    }
    assert!(reported > 120, "{reported}");
}

#[test]
fn two_gpus_that_cannot_reach_each_other_are_named() {
    let fake = FakeDriver::with(4, 9);
    fake.forbid_peer(2, 1);
    let error = CudaBackend::open(find_gpus(3).unwrap()).err().unwrap();
    assert!(matches!(error, CudaError::NoPeerAccess { from: 2, to: 1, .. }), "{error}");
    assert_eq!(fake.live(), "");
}

#[test]
fn the_compilers_log_is_in_the_error() {
    let fake = FakeDriver::with(1, 9);
    let backend = CudaBackend::open(find_gpus(1).unwrap()).unwrap();
    let error = backend.prepare("moe", "no PTX", 1024).unwrap_err();
    drop(backend);
    let text = error.to_string();
    assert!(text.starts_with("GPU 0 (Fake GPU) rejected the kernel's PTX: cuModuleLoadDataEx failed"), "{text}");
    assert!(text.contains("\nfake ptxas: "), "{text}");
    assert_eq!(fake.live(), "");
}

#[test]
fn gpus_are_chosen_by_number_and_compute_capability() {
    let fake = FakeDriver::with(2, 9);
    assert_eq!(find_gpus(1).unwrap().iter().map(|gpu| (gpu.ordinal, gpu.sms)).collect::<Vec<_>>(), [(0, 6)]);
    assert_eq!(find_gpus(2).unwrap().len(), 2);
    let error = find_gpus(3).unwrap_err();
    assert!(error.to_string().contains("3 rank(s) need"), "{error}");
    assert!(error.to_string().contains("found Fake GPU (9.0), Fake GPU (9.0)"), "{error}");
    drop(fake);

    let fake = FakeDriver::with(2, 8);
    let error = find_gpus(1).unwrap_err();
    assert!(error.to_string().contains("found Fake GPU (8.0)"), "{error}");
    drop(fake);

    let _fake = FakeDriver::with(0, 9);
    assert_eq!(find_gpus(1).unwrap_err(), CudaError::TooFewGpus { ranks: 1, found: vec![] });
}

#[test]
fn a_layer_that_forgets_its_buffers_leaks_none() {
    let fake = FakeDriver::with(1, 9);
    let backend = CudaBackend::open(find_gpus(1).unwrap()).unwrap();
    let address = backend.alloc(0, 64, "forgotten").unwrap();
    let error = backend.free(0, address + 1).unwrap_err();
    assert!(error.to_string().contains("is no buffer to free"), "{error}");
    drop(backend);
    assert_eq!(fake.live(), "");
}

#[test]
fn too_much_memory_says_what_for() {
    let _fake = FakeDriver::with(1, 9);
    let backend = CudaBackend::open(find_gpus(1).unwrap()).unwrap();
    let error = backend.alloc(0, 1 << 40, "weights").unwrap_err();
    assert_eq!(
        error.to_string(),
        "cuMemAlloc_v2 failed for the 1099511627776 bytes of weights on rank 0: \
         CUDA_ERROR_OUT_OF_MEMORY (2), out of memory"
    );
}

#[test]
fn what_no_driver_would_take_is_refused_before_it_is_asked() {
    let fake = FakeDriver::with(1, 9);
    let backend = CudaBackend::open(find_gpus(1).unwrap()).unwrap();
    let not_prepared = backend.launch(&[launch(0, &[1, 2])]).unwrap_err();
    assert_eq!(not_prepared.to_string(), "moe was not prepared before its launch");
    backend.prepare("moe", PTX, 1024).unwrap();
    let too_large = backend.launch(&[launch(0, &[1, 2])]).unwrap_err();
    assert_eq!(too_large.to_string(), "moe was prepared for 1024 bytes of shared memory, not 225280");
    backend.prepare("moe", PTX, 220 << 10).unwrap();
    let too_many = backend.launch(&[launch(0, &[0; 17])]).unwrap_err();
    assert_eq!(too_many.to_string(), "moe has 17 arguments, at most 16");
    let other_rank = backend.launch(&[launch(1, &[1, 2])]).unwrap_err();
    assert_eq!(other_rank.to_string(), "rank 1 is not of this process, which has ranks 0..1");
    assert!(fake.calls_of("cuLaunchKernelEx").is_empty());
    let missing = backend.prepare("other", PTX, 0).unwrap_err();
    assert!(missing.to_string().starts_with("cuModuleGetFunction failed looking for other in the PTX"), "{missing}");
    let map = TensorMapSpec { box_dims: vec![128, 4], ..weights_map(0) };
    assert_eq!(
        backend.encode_tensor_map(&map).unwrap_err().to_string(),
        "tensor map: the box's innermost dimension is 256 bytes; with this swizzle it must be at most 128"
    );
    assert!(fake.calls_of("cuTensorMapEncodeTiled").is_empty());
}

#[test]
fn a_launch_can_be_captured_and_replayed() {
    let fake = FakeDriver::with(1, 9);
    let backend = CudaBackend::open(find_gpus(1).unwrap()).unwrap();
    backend.prepare("moe", PTX, 220 << 10).unwrap();
    let stream = Stream::new(StreamFlags::DEFAULT, None).map_err(driver::failure).err();
    assert!(
        matches!(stream, Some(CudaError::Call { call: "cuStreamCreateWithPriority", .. })),
        "no context is current"
    );

    let context = cust::context::Context::new(cust::device::Device::get_device(0).unwrap()).unwrap();
    let stream = Stream::new(StreamFlags::DEFAULT, None).unwrap();
    let raw = stream.as_inner().cast();
    // SAFETY: the stream is alive and not captured, and fake kernels use nothing.
    let graph = unsafe { CapturedGraph::capture(raw, || backend.enqueue(&launch(0, &[5, 6]), raw)) }.unwrap();
    assert_eq!(fake.calls_of("cuLaunchKernelEx").len(), 1);
    for _ in 0..2 {
        // SAFETY: as above.
        unsafe { graph.launch(raw) }.unwrap();
    }
    let replayed = fake.calls_of("cuGraphLaunch");
    assert_eq!(replayed.len(), 2);
    assert!(replayed[0].ends_with("moe grid=[132, 1, 1] block=[384, 1, 1] shared=225280 args=[5, 6]"), "{replayed:?}");

    // What may not be captured is an error, and the stream is usable afterwards.
    // SAFETY: as above.
    let error = unsafe { CapturedGraph::capture(raw, || backend.alloc(0, 64, "too late").map(|_| ())) }.unwrap_err();
    assert_eq!(failed_call(&error), Some("cuMemAlloc_v2"), "{error}");
    stream.synchronize().unwrap();
    drop((graph, stream, backend, context));
    assert_eq!(fake.live(), "");
}

#[test]
fn a_rank_that_cannot_be_launched_leaves_no_other_running() {
    let fake = FakeDriver::with(2, 9);
    let backend = CudaBackend::open(find_gpus(2).unwrap()).unwrap();
    backend.prepare("moe", PTX, 220 << 10).unwrap();
    let refused = RankLaunch { block: [2048, 1, 1], ..launch(1, &[3, 4]) };
    let error = backend.launch(&[launch(0, &[1, 2]), refused]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cuLaunchKernelEx failed for moe on rank 1: CUDA_ERROR_INVALID_VALUE (1), invalid argument"
    );
    assert_eq!(
        fake.calls_of("cuStreamSynchronize"),
        ["cuStreamSynchronize gpu=0 own", "cuStreamSynchronize gpu=1 own"]
    );
    assert!(fake.calls_of("cuEventElapsedTime").is_empty());
}

#[test]
fn several_ranks_share_gpus_when_told_to() {
    let fake = FakeDriver::with(2, 9);
    let ordinals = |gpus: &[super::Gpu]| gpus.iter().map(|gpu| gpu.ordinal).collect::<Vec<_>>();
    assert_eq!(ordinals(&share_gpu(2).unwrap()), [0, 1]);
    let shared = share_gpu(3).unwrap();
    assert_eq!(ordinals(&shared), [0, 1, 0]);
    let backend = CudaBackend::open(shared).unwrap();
    assert_eq!((0..3).map(|rank| backend.sms(rank)).collect::<Vec<_>>(), [3; 3]);
    backend.prepare("moe", PTX, 220 << 10).unwrap();
    backend.launch(&[launch(0, &[1, 2]), launch(2, &[3, 4])]).unwrap();
    drop(backend);
    assert_eq!(fake.live(), "");
    drop(fake);
    let _none = FakeDriver::with(0, 9);
    assert!(matches!(share_gpu(3), Err(CudaError::TooFewGpus { .. })));
}

#[test]
fn ranks_of_several_processes_map_each_others_buffers() {
    let fake = FakeDriver::with(3, 9);
    several_processes(3).into_iter().collect::<Result<(), _>>().unwrap();
    let mut opened = fake.calls_of("cuIpcOpenMemHandle_v2");
    opened.sort();
    let pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)];
    assert_eq!(opened, pairs.map(|(gpu, owner)| format!("cuIpcOpenMemHandle_v2 gpu={gpu} owner={owner}")));
    assert!(fake.calls_of("cuCtxEnablePeerAccess").is_empty());
    let calls = fake.calls();
    let last_unmapped = calls.iter().rposition(|call| call.starts_with("cuIpcCloseMemHandle")).unwrap();
    let first_freed = calls.iter().position(|call| call.starts_with("cuMemFree")).unwrap();
    assert!(last_unmapped < first_freed, "freed while another process had it mapped: {calls:#?}");
    assert_eq!(fake.live(), "");
}

#[test]
fn a_buffer_that_one_rank_cannot_map_fails_all_ranks_and_leaks_nothing() {
    let fake = FakeDriver::with(2, 9);
    fake.forbid_peer(1, 0);
    let errors: Vec<String> = several_processes(2).into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert_eq!(errors[0], "rank 1 could not map the other ranks' symmetric buffer");
    let own = "cuIpcOpenMemHandle_v2 failed for another process's symmetric buffer, on rank 1";
    assert!(errors[1].starts_with(own), "{errors:?}");
    assert_eq!(fake.live(), "");
}

/// A layer on two fake GPUs, which run the kernel in the simulator.
#[test]
fn a_captured_layer_is_replayed_with_other_token_counts() {
    let fake = FakeDriver::with(2, 9);
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let group = DeviceGroup::open(Device::Cuda, 2).unwrap();
    let moe = layer(&group, &config, &weights).unwrap();
    let engine = [0, 1].map(|rank| EngineRank::new(&group, &config, rank));
    let capture = |rank: usize, engine: &EngineRank| {
        let stream = engine.stream.raw();
        // SAFETY: the stream is the rank's, and everything lives until the graph is dropped.
        let graph = unsafe { CapturedGraph::capture::<Error>(stream, || moe.enqueue(rank, stream, engine.inputs())) };
        graph.unwrap()
    };
    let before = fake.calls().len();
    let graphs = [capture(0, &engine[0]), capture(1, &engine[1])];
    let captured = fake.calls().split_off(before);
    let forbidden = ["Alloc", "Free", "Memcpy", "Memset", "Synchronize"];
    let found = captured.iter().find(|call| forbidden.iter().any(|word| call.contains(word)));
    assert_eq!(found, None, "a queued launch neither waits nor allocates");

    for (step, counts) in [[3, 16], [16, 0], [1, 5]].into_iter().enumerate() {
        let tokens = counts.map(|count| Tokens::random(&config, count, (10 * step + count) as u64));
        engine.iter().zip(&tokens).for_each(|(engine, tokens)| engine.write(tokens));
        for (graph, engine) in graphs.iter().zip(&engine) {
            // SAFETY: the graph was captured on this stream, and all that it uses is alive.
            unsafe { graph.launch(engine.stream.raw()) }.unwrap();
        }
        engine.iter().for_each(|engine| engine.stream.synchronize().unwrap());
        moe.workspace().check().unwrap();
        for (engine, tokens) in engine.iter().zip(&tokens) {
            tokens.check(&config, &weights, &engine.output(tokens), &format!("replay {step}"));
        }
    }
    assert_eq!(fake.calls_of("cuLaunchKernelEx").len(), 2, "only those that were captured");
    assert_eq!(fake.calls_of("cuGraphLaunch").len(), 6);
    drop((graphs, engine, moe, group));
    assert_eq!(fake.live(), "");
}

#[test]
fn two_layers_of_a_workspace_are_captured_in_one_graph() {
    let fake = FakeDriver::with(2, 9);
    let small = small_config();
    let configs =
        [MoeConfig { experts: 6, intermediate: 128, ..small.clone() }, MoeConfig { shared_experts: 2, ..small }];
    let group = DeviceGroup::open(Device::Cuda, 2).unwrap();
    let workspace = Workspace::new(&group, &WorkspaceSizes::of(&configs)).unwrap();
    let layers = configs.map(|config| {
        let weights = ExpertWeights::random(&config, 5);
        let moe = FusedMoe::new(&workspace, &config, &weights).unwrap();
        let ranks = [0, 1].map(|rank| (EngineRank::new(&group, &config, rank), Tokens::random(&config, 3 + rank, 1)));
        ranks.iter().for_each(|(engine, tokens)| engine.write(tokens));
        (moe, weights, ranks)
    });
    let capture = |rank: usize| {
        let stream = layers[0].2[rank].0.stream.raw();
        let enqueue = || {
            layers.iter().try_for_each(|(moe, _, ranks)| {
                // SAFETY: the stream is the rank's, and everything lives until the graph is dropped.
                unsafe { moe.enqueue(rank, stream, ranks[rank].0.inputs()) }
            })
        };
        // SAFETY: as above.
        unsafe { CapturedGraph::capture::<Error>(stream, enqueue) }.unwrap()
    };
    let graphs = [capture(0), capture(1)];
    for replay in 0..2 {
        for (graph, (engine, _)) in graphs.iter().zip(&layers[0].2) {
            // SAFETY: the graph was captured on this stream, and all that it uses is alive.
            unsafe { graph.launch(engine.stream.raw()) }.unwrap();
        }
        layers[0].2.iter().for_each(|(engine, _)| engine.stream.synchronize().unwrap());
        workspace.check().unwrap();
        for (moe, weights, ranks) in &layers {
            for (engine, tokens) in ranks {
                tokens.check(moe.config(), weights, &engine.output(tokens), &format!("replay {replay}"));
            }
        }
    }
    assert_eq!(fake.calls_of("cuLaunchKernelEx").len(), 4, "two layers of each rank");
    drop((graphs, layers, workspace, group));
    assert_eq!(fake.live(), "");
}

/// A kernel with the entry and the arguments of the real one that does nothing.
const EMPTY_LAYER: &str = ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry ferromoe_bf16(\n.param .u64 a,\n\
    .param .u64 b,\n.param .u64 c,\n.param .u64 d,\n.param .u64 e,\n.param .u64 f,\n.param .u64 g\n)\n{ ret; }\n";

/// Everything that an engine does with a layer, one launch in a CUDA graph included.
fn whole_layer(group: &DeviceGroup, config: &MoeConfig, weights: &ExpertWeights) -> Result<(), Error> {
    let mut moe = layer(group, config, weights)?;
    moe.set_deadline(Duration::from_secs(1));
    let tokens: Vec<_> = group.local_ranks().map(|rank| Tokens::random(config, 3 + rank, 1)).collect();
    moe.forward(&tokens.iter().map(Tokens::batch).collect::<Vec<_>>())?;
    let rank = group.local_ranks().end - 1;
    let memory = group.alloc(rank, 64, "engine memory")?;
    memory.write(&[1; 64])?;
    let stream = group.stream(rank)?;
    let address = memory.address();
    let inputs = RankInputs {
        hidden_states: moe.workspace().hidden_states(rank)?.address(),
        hidden_scales: 0,
        topk_idx: address,
        topk_weights: address,
        tokens: address,
        output: address,
        most_tokens: 1,
    };
    // SAFETY: the kernel uses nothing, and the stream outlives the graph.
    let graph = unsafe { CapturedGraph::capture::<Error>(stream.raw(), || moe.enqueue(rank, stream.raw(), inputs)) }?;
    // SAFETY: as above.
    unsafe { graph.launch(stream.raw()) }?;
    stream.synchronize()?;
    moe.workspace().check()?;
    moe.workspace().recover()
}

/// Asserts that what came of a failing call is an error that names it.
fn check_reported(result: Result<(), Error>, call: &str) {
    match result {
        Err(error) => assert_eq!(failed_call(&error), Some(call), "{error}"),
        // What fails in a destructor is logged; `cuCtxGetCurrent` and `cuCtxSetCurrent` are also called there.
        Ok(()) => assert!(
            ["Free", "Destroy", "Unload", "Release", "Close", "Current"].iter().any(|word| call.contains(word)),
            "the failure of {call} was swallowed"
        ),
    }
}

#[test]
fn a_layer_whose_driver_fails_anywhere_reports_the_call_and_leaks_nothing() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    let layer = || {
        let group = DeviceGroup::new(CudaBackend::open(find_gpus(2)?)?, false, "as a test").with_ptx(EMPTY_LAYER);
        whole_layer(&group, &config, &weights)
    };
    for call in 0.. {
        let fake = FakeDriver::with(2, 9);
        fake.fail(call, LAUNCH_FAILED);
        let result = layer();
        let failed = fake.text("fake_failed");
        assert_eq!(fake.live(), "", "after call {call}, {failed}, failed: {:#?}", fake.calls());
        if failed.is_empty() {
            assert!(call > 200, "{call}");
            return result.unwrap();
        }
        check_reported(result, &failed);
    }
}

#[test]
fn a_process_whose_driver_fails_anywhere_takes_the_others_along_and_nobody_leaks() {
    let config = small_config();
    let weights = ExpertWeights::random(&config, 5);
    for failing in 0..2 {
        for call in 0.. {
            let fake = FakeDriver::with(2, 9);
            let mut results = processes(2, |gpu, others| {
                if others.member().rank == failing {
                    fake.fail_own(call, LAUNCH_FAILED);
                }
                let backend = CudaBackend::open_process(gpu, others)?;
                whole_layer(&DeviceGroup::new(backend, false, "as a test").with_ptx(EMPTY_LAYER), &config, &weights)
            });
            let failed = fake.text("fake_failed");
            assert_eq!(fake.live(), "", "after rank {failing}'s call {call}, {failed}, failed: {:#?}", fake.calls());
            if failed.is_empty() {
                assert!(call > 100, "{call}");
                results.into_iter().for_each(Result::unwrap);
                break;
            }
            check_reported(results.remove(failing), &failed);
            // The other rank ends too, and not for a failure of its own driver.
            if let Err(error) = results.remove(0) {
                assert_eq!(failed_call(&error), None, "after rank {failing}'s call {call}, {failed}: {error}");
            }
        }
    }
}

#[test]
fn processes_take_gpus_if_every_rank_has_one() {
    let joined = |gpus| {
        let _fake = FakeDriver::with(gpus, 9);
        let folder = tempfile::tempdir().unwrap();
        let address = RendezvousAddress::Unix(folder.path().join("group"));
        let join = |rank| {
            let device = Device::Auto(SimOptions::default());
            DeviceGroup::join(device, rank, 2, &address, Duration::from_secs(20)).unwrap().description().to_owned()
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| join(1));
            [join(0), other.join().unwrap()]
        })
    };
    assert_eq!(joined(2), [0, 1].map(|rank| format!("rank {rank} of 2, Fake GPU (found on this machine)")));
    let simulated = "2 simulated ranks of 4 SMs (2 ranks need as many Hopper GPUs, found Fake GPU (9.0))";
    assert_eq!(joined(1), [0, 1].map(|rank| format!("rank {rank} of {simulated}")));
}
