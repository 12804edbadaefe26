// SPDX-License-Identifier: Apache-2.0
// CRC-32 as zip and zlib have it: by carry-less multiplication where the CPU can, else by tables.
#include <stdint.h>
#include <string.h>

#include "../api/ds_api.h"
#include "cpuid.h"
#include "dispatch.h"

#if defined(__x86_64__) || defined(_M_X64)
#define DS_CLMUL 1
#include <immintrin.h>
#endif
#if defined(DS_CLMUL) && !defined(_MSC_VER)
#define DS_TARGET_CLMUL __attribute__((target("pclmul,sse2")))
#define DS_TARGET_WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul")))
#else
#define DS_TARGET_CLMUL
#define DS_TARGET_WIDE
#endif

namespace {

const uint32_t kPolynomial = 0xEDB88320u;  // bits reversed

// Sums of one byte followed by 0 to 7 zeros: eight bytes take eight independent look-ups.
struct Tables {
    uint32_t of[8][256];

    Tables() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t value = byte;
            for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? kPolynomial : 0);
            of[0][byte] = value;
        }
        for (int zeros = 1; zeros < 8; ++zeros)
            for (uint32_t byte = 0; byte < 256; ++byte) {
                const uint32_t value = of[zeros - 1][byte];
                of[zeros][byte] = value >> 8 ^ of[0][value & 255];
            }
    }
};

const Tables &tables() {
    static const Tables made;
    return made;
}

uint32_t by_tables(const unsigned char *data, int64_t bytes, uint32_t sum) {
    const Tables &t = tables();
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint32_t next = 0;
        for (int i = 0; i < 4; ++i) next |= (uint32_t)data[i] << (8 * i);
        sum ^= next;
        sum = t.of[7][sum & 255] ^ t.of[6][sum >> 8 & 255] ^ t.of[5][sum >> 16 & 255] ^
              t.of[4][sum >> 24] ^ t.of[3][data[4]] ^ t.of[2][data[5]] ^ t.of[1][data[6]] ^
              t.of[0][data[7]];
    }
    for (; bytes > 0; --bytes, ++data) sum = sum >> 8 ^ t.of[0][(sum ^ *data) & 255];
    return sum;
}

#if defined(DS_CLMUL)

// A lane of 128 bits moved onto the one that `powers` lie behind: both halves times their power of x, added.
DS_TARGET_CLMUL inline __m128i fold(__m128i lane, __m128i powers, __m128i onto) {
    const __m128i low = _mm_clmulepi64_si128(lane, powers, 0x00);
    const __m128i high = _mm_clmulepi64_si128(lane, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

DS_TARGET_CLMUL inline __m128i at(const unsigned char *data) {
    return _mm_loadu_si128((const __m128i *)data);
}

// The sum of a lane, which stands for all before it, and of the bytes behind.
DS_TARGET_CLMUL uint32_t finish(__m128i lane, const unsigned char *data, int64_t bytes) {
    const __m128i by128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    for (; bytes >= 16; data += 16, bytes -= 16) lane = fold(lane, by128, at(data));
    unsigned char rest[16];
    memcpy(rest, &lane, 16);
    return by_tables(data, bytes, by_tables(rest, 16, 0));
}

// The powers are x^(distance - 32) and x^(distance + 32) modulo the polynomial, bits reversed.
DS_TARGET_CLMUL uint32_t by_clmul(const unsigned char *data, int64_t bytes, uint32_t sum) {
    const __m128i by1024 = _mm_set_epi64x(0x014a7fe880, 0x01e88ef372);
    const __m128i by128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = at(data + 16 * i);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128((int)sum));
    data += 128, bytes -= 128;
    for (; bytes >= 128; data += 128, bytes -= 128)
        for (int i = 0; i < 8; ++i) lanes[i] = fold(lanes[i], by1024, at(data + 16 * i));
    __m128i lane = lanes[0];
    for (int i = 1; i < 8; ++i) lane = fold(lane, by128, lanes[i]);
    return finish(lane, data, bytes);
}

// Four times as wide, and no slower than memory: four lanes in each of four registers.
DS_TARGET_WIDE uint32_t by_wide_clmul(const unsigned char *data, int64_t bytes, uint32_t sum) {
    const __m512i by2048 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x01322d1430, 0x011542778a));
    const __m128i by128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m512i wide[4];
    for (int i = 0; i < 4; ++i) wide[i] = _mm512_loadu_si512(data + 64 * i);
    wide[0] = _mm512_xor_si512(wide[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)sum)));
    data += 256, bytes -= 256;
    for (; bytes >= 256; data += 256, bytes -= 256)
        for (int i = 0; i < 4; ++i) {
            const __m512i low = _mm512_clmulepi64_epi128(wide[i], by2048, 0x00);
            const __m512i high = _mm512_clmulepi64_epi128(wide[i], by2048, 0x11);
            const __m512i next = _mm512_loadu_si512(data + 64 * i);
            wide[i] = _mm512_ternarylogic_epi64(low, high, next, 0x96);  // all three added
        }
    unsigned char lanes[256];
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(lanes + 64 * i, wide[i]);
    __m128i lane = at(lanes);
    for (int i = 1; i < 16; ++i) lane = fold(lane, by128, at(lanes + 16 * i));
    return finish(lane, data, bytes);
}

#endif

}  // namespace

extern "C" uint32_t ds_crc32(const void *data, int64_t bytes, uint32_t value) {
    const unsigned char *begin = (const unsigned char *)data;
    uint32_t sum = ~value;
#if defined(DS_CLMUL)
    // asking the CPU is slow in a virtual machine
    static const bool clmul = ds::cpu_has_clmul(), wide = ds::cpu_has_wide_clmul();
    if (bytes >= 1024 && wide) return ~by_wide_clmul(begin, bytes, sum);
    if (bytes >= 256 && clmul) return ~by_clmul(begin, bytes, sum);
#endif
    return ~by_tables(begin, bytes, sum);
}

extern "C" uint32_t ds_copy_crc32(const void *from, void *to, int64_t bytes, uint32_t value) {
    const int64_t kPage = 4096;  // small enough to be in the first cache when it is copied
    const Kernels *kernels = ds::kernels();
    const bool streams = (((uintptr_t)from | (uintptr_t)to) & 63) == 0;
    for (int64_t at = 0; at < bytes; at += kPage) {
        const char *source = (const char *)from + at;
        char *target = (char *)to + at;
        const int64_t n = bytes - at < kPage ? bytes - at : kPage;
        const int64_t lines = streams ? n & ~(int64_t)63 : 0;
        value = ds_crc32(source, n, value);
        kernels->stream(source, target, lines);
        memcpy(target + lines, source + lines, (size_t)(n - lines));
    }
    kernels->settle();
    return value;
}
