// SPDX-License-Identifier: Apache-2.0
// CRC-32 as zip and zlib have it: by carry-less multiplication where the CPU can, else by tables.
#include <stdint.h>
#include <string.h>

#include "../api/ds_api.h"
#include "cpuid.h"

#if defined(__x86_64__) || defined(_M_X64)
#define DS_CLMUL 1
#include <emmintrin.h>
#include <wmmintrin.h>
#endif
#if defined(DS_CLMUL) && !defined(_MSC_VER)
#define DS_TARGET_CLMUL __attribute__((target("pclmul,sse2")))
#else
#define DS_TARGET_CLMUL
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
    for (; bytes >= 16; data += 16, bytes -= 16) lane = fold(lane, by128, at(data));
    // What is left stands for all before it: sum it like any other 16 bytes.
    unsigned char rest[16];
    memcpy(rest, &lane, 16);
    return by_tables(data, bytes, by_tables(rest, 16, 0));
}

#endif

}  // namespace

extern "C" uint32_t ds_crc32(const void *data, int64_t bytes, uint32_t value) {
    const unsigned char *begin = (const unsigned char *)data;
    uint32_t sum = ~value;
#if defined(DS_CLMUL)
    static const bool clmul = ds::cpu_has_clmul();  // asking the CPU is slow in a virtual machine
    if (bytes >= 256 && clmul) return ~by_clmul(begin, bytes, sum);
#endif
    return ~by_tables(begin, bytes, sum);
}
