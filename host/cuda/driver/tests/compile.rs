//! NVRTC compiles kernels and the cache keeps them, where NVRTC can be loaded; no GPU is needed. Where it cannot, each test
//! says so and checks what the error says.

use clip_host_cuda_driver::CudaError;
use clip_host_cuda_driver::compile::{Cache, compile, version};
use std::fs;
use std::path::PathBuf;
use std::thread;

/// An elementwise kernel, and a row reduction with shared memory, a shuffle and bfloat16 by the hardware's conversion.
const KERNELS: &str = r#"
typedef unsigned short bf16;

__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

extern "C" __global__ void scale(float *__restrict__ y, const float *__restrict__ x, long long n, unsigned long long bits) {
    const float factor = __uint_as_float((unsigned)bits);
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
        y[i] = factor * x[i];
}

extern "C" __global__ void row_sums(bf16 *y, const float *x, long long columns) {
    extern __shared__ float partial[];
    float sum = 0;
    for (long long c = threadIdx.x; c < columns; c += blockDim.x) sum += x[blockIdx.x * columns + c];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (int warp = 0; warp < blockDim.x / 32; warp++) total += partial[warp];
        y[blockIdx.x] = to_bf16(total);
    }
}
"#;

/// Whether NVRTC is there; says so if not.
fn nvrtc(test: &str) -> bool {
    match version() {
        Ok((major, minor)) => {
            println!("{test}: NVRTC {major}.{minor}");
            true
        }
        Err(error) => {
            println!("{test}: SKIPPED: {error}");
            let CudaError::Library { library, looked_in, .. } = &error else { panic!("{error}") };
            assert!(library.starts_with("libnvrtc.so."), "{library}");
            assert!(looked_in.iter().any(|place| place.starts_with("the loader's path (")), "{looked_in:?}");
            assert_eq!(compile(KERNELS, (9, 0), &[]), Err(error));
            false
        }
    }
}

/// A folder of the test's own.
fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("clip_host_cuda_{name}_{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

#[test]
fn kernels_compile_for_two_architectures() {
    if !nvrtc("kernels_compile_for_two_architectures") {
        return;
    }
    let cubins = [(8, 0), (9, 0)].map(|arch| compile(KERNELS, arch, &["--fmad=false"]).unwrap());
    for cubin in &cubins {
        assert!(cubin.starts_with(b"\x7fELF"), "{:?}", &cubin[..4]);
        for name in ["scale", "row_sums"] {
            assert!(cubin.windows(name.len()).any(|window| window == name.as_bytes()), "no {name}");
        }
    }
    assert_ne!(cubins[0], cubins[1]);
    assert_eq!(compile(KERNELS, (9, 0), &["--fmad=false"]).unwrap(), cubins[1], "compiling is not deterministic");
}

#[test]
fn an_error_shows_the_log_and_the_lines() {
    if !nvrtc("an_error_shows_the_log_and_the_lines") {
        return;
    }
    let broken = KERNELS.replace("float total = 0;", "flaot total = 0;");
    let line = 1 + broken.lines().position(|line| line.contains("flaot")).unwrap();
    let error = compile(&broken, (9, 0), &[]).unwrap_err();
    let CudaError::Compile { arch: (9, 0), log, excerpt } = &error else { panic!("{error:?}") };
    assert!(log.contains(&format!("kernels.cu({line}): error: ")) && log.contains("flaot"), "{log}");
    assert!(excerpt.contains(&format!("> {line:5} |         flaot total = 0;\n")), "{excerpt}");
    assert!(excerpt.contains(&format!("  {:5} |     if (threadIdx.x == 0) {{\n", line - 1)), "{excerpt}");
    let text = error.to_string();
    assert!(text.starts_with("cannot compile the kernel for sm_90: expected CUDA C without errors, got:\n"), "{text}");
    println!("{text}");
}

#[test]
fn an_unknown_option_or_architecture_is_told() {
    if !nvrtc("an_unknown_option_or_architecture_is_told") {
        return;
    }
    for (arch, options) in [((9, 0), &["--no-such-option"][..]), ((9, 9), &[])] {
        let error = compile(KERNELS, arch, options).unwrap_err();
        let CudaError::Compile { log, .. } = &error else { panic!("{error:?}") };
        assert!(log.contains("nvrtc: error: "), "{error}");
    }
}

#[test]
fn text_with_a_zero_byte_is_refused() {
    if !nvrtc("text_with_a_zero_byte_is_refused") {
        return;
    }
    let error = compile("int x;\0", (9, 0), &[]).unwrap_err();
    assert!(matches!(error, CudaError::Argument { .. }), "{error:?}");
}

#[test]
fn the_cache_hits_and_survives_damage() {
    if !nvrtc("the_cache_hits_and_survives_damage") {
        return;
    }
    let folder = folder("cache");
    let cache = Cache::open(&folder).unwrap();
    let path = cache.path(KERNELS, (9, 0), &[]).unwrap();
    for other in [
        cache.path(&format!("{KERNELS} "), (9, 0), &[]).unwrap(),
        cache.path(KERNELS, (8, 0), &[]).unwrap(),
        cache.path(KERNELS, (9, 0), &["--fmad=false"]).unwrap(),
    ] {
        assert_ne!(path, other);
    }

    let cubin = cache.get_or_compile(KERNELS, (9, 0), &[]).unwrap();
    let entry = fs::read(&path).unwrap();
    assert!(entry.ends_with(&cubin));
    // A hit compiles nothing: a valid entry with other contents is what comes back.
    let small = cache.path("extern \"C\" __global__ void f() {}", (9, 0), &[]).unwrap();
    cache.get_or_compile("extern \"C\" __global__ void f() {}", (9, 0), &[]).unwrap();
    fs::copy(&small, &path).unwrap();
    assert_ne!(cache.get_or_compile(KERNELS, (9, 0), &[]).unwrap(), cubin);
    // Damage is found and mended.
    for damaged in [&entry[..entry.len() / 2], b"", &[&entry[..100], b"x", &entry[101..]].concat()] {
        fs::write(&path, damaged).unwrap();
        assert_eq!(cache.get_or_compile(KERNELS, (9, 0), &[]).unwrap(), cubin);
        assert_eq!(fs::read(&path).unwrap(), entry);
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_cache_takes_several_at_once() {
    if !nvrtc("the_cache_takes_several_at_once") {
        return;
    }
    let folder = folder("cache_several");
    let cubins: Vec<Vec<u8>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                // A cache of its own, as another process would have.
                scope.spawn(|| Cache::open(&folder).unwrap().get_or_compile(KERNELS, (8, 0), &[]).unwrap())
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(cubins.iter().all(|cubin| *cubin == cubins[0]));
    // One entry, and nothing left of the temporary files.
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_cache_that_cannot_be_is_told() {
    let folder = folder("cache_file");
    fs::write(&folder, "a file").unwrap();
    let Err(error) = Cache::open(folder.join("cache")) else { panic!("made a folder in a file") };
    assert!(error.to_string().starts_with("cannot make the kernel cache "), "{error}");
    fs::remove_file(folder).unwrap();
}
