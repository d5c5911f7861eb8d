// What every rendered kernel stands on: element types, wide loads and stores, reductions, random numbers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

// Two-byte floats as they lie in memory.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

DEVICE float widen(float v) { return v; }
DEVICE float widen(int v) { return (float)v; }
DEVICE float widen(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
DEVICE void narrow(float v, float &out) { out = v; }
DEVICE void narrow(float v, int &out) { out = (int)v; }

#if defined(__CUDA_ARCH__)
DEVICE float widen(f16 v) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
    return out;
}
DEVICE void narrow(float v, bf16 &out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
DEVICE void narrow(float v, f16 &out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
#endif

struct __align__(16) Words4 { u32 w[4]; };
struct __align__(8) Words2 { u32 w[2]; };

// V elements from an address that is a multiple of their size (of 16 bytes if they are more).
template <int V, typename T> DEVICE void load(float (&out)[V], const T *from) {
    __align__(16) T values[V];
    if constexpr (V * sizeof(T) >= 16) {
#pragma unroll
        for (int i = 0; i < (int)(V * sizeof(T) / 16); i++) ((Words4 *)values)[i] = ((const Words4 *)from)[i];
    } else if constexpr (V * sizeof(T) == 8) {
        *(Words2 *)values = *(const Words2 *)from;
    } else if constexpr (V * sizeof(T) == 4) {
        *(u32 *)values = *(const u32 *)from;
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) values[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < V; i++) out[i] = widen(values[i]);
}

template <int V, typename T> DEVICE void store(T *to, const float (&in)[V]) {
    __align__(16) T values[V];
#pragma unroll
    for (int i = 0; i < V; i++) narrow(in[i], values[i]);
    if constexpr (V * sizeof(T) >= 16) {
#pragma unroll
        for (int i = 0; i < (int)(V * sizeof(T) / 16); i++) ((Words4 *)to)[i] = ((const Words4 *)values)[i];
    } else if constexpr (V * sizeof(T) == 8) {
        *(Words2 *)to = *(const Words2 *)values;
    } else if constexpr (V * sizeof(T) == 4) {
        *(u32 *)to = *(const u32 *)values;
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = values[i];
    }
}

// The same of the first n elements, from any address; the others are 0.
template <int V, typename T> DEVICE void load_some(float (&out)[V], const T *from, int n) {
#pragma unroll
    for (int i = 0; i < V; i++) out[i] = i < n ? widen(from[i]) : 0.0f;
}

template <int V, typename T> DEVICE void store_some(T *to, const float (&in)[V], int n) {
#pragma unroll
    for (int i = 0; i < V; i++)
        if (i < n) narrow(in[i], to[i]);
}

// NaN wins, as in PyTorch.
DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

struct Sum {
    static DEVICE_MEMBER float zero() { return 0.0f; }
    static DEVICE_MEMBER float join(float a, float b) { return a + b; }
};
struct Max {
    static DEVICE_MEMBER float zero() { return __uint_as_float(0xff800000u); }
    static DEVICE_MEMBER float join(float a, float b) { return larger(a, b); }
};

// Over groups of LANES neighbouring threads, a power of two up to 32: every thread has the result.
template <int LANES, typename Op> DEVICE float reduce_lanes(float v) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) v = Op::join(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}

// Over the whole block of THREADS threads, a multiple of 32; `room` has 32 floats. Every thread has the result.
template <int THREADS, typename Op> DEVICE float reduce_block(float v, float *room) {
    v = reduce_lanes<32, Op>(v);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    __syncthreads();
    v = room[0];
    for (int i = 1; i < THREADS / 32; i++) v = Op::join(v, room[i]);
    __syncthreads();
    return v;
}

// SplitMix64's finaliser.
DEVICE u64 mix(u64 z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

DEVICE u64 random_key(u64 seed, u32 stream) { return mix(seed ^ mix((u64)stream + 0x9e3779b97f4a7c15ull)); }

// The 64 random bits of an element.
DEVICE u64 random_word(u64 key, u64 index) { return mix(key ^ (index * 0xd1342543de82ef95ull)); }

// Rounds to bf16 at random, by the top 16 bits of a word: the host's `stochastic_bf16`, bit by bit.
DEVICE bf16 stochastic(float v, u64 word) {
    const u32 bits = __float_as_uint(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const u32 rounded = (magnitude + (u32)(word >> 48)) >> 16;
    const u32 finite = sign | (rounded < 0x7f7f ? rounded : 0x7f7f);
    const u32 special = magnitude > 0x7f800000u ? bits >> 16 | 0x40 : bits >> 16;
    bf16 out;
    out.bits = magnitude < 0x00800000u ? 0 : magnitude < 0x7f800000u ? finite : special;
    return out;
}

// V elements, rounded at random by their numbers from `first` on, to any address.
template <int V> DEVICE void store_stochastic(bf16 *to, const float (&in)[V], int n, u64 key, u64 first) {
#pragma unroll
    for (int i = 0; i < V; i++)
        if (i < n) to[i] = stochastic(in[i], random_word(key, first + i));
}

// Uniform in [0, 1) by element number.
DEVICE float uniform(u64 key, u64 index) {
    return (float)(random_word(key, index) >> 40) / 16777216.0f;
}
