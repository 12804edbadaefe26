// SPDX-License-Identifier: Apache-2.0
// A program that calls the native library through its C ABI only: every path must give the bits of the scalar one,
// for any number of threads, from several threads at once. Built and run by test_native_check.py, under sanitizers and
// for other processors.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/api/ds_api.h"

namespace {

// xorshift: the same numbers everywhere.
uint32_t g_random = 2463534242u;
uint32_t random_bits() {
    g_random ^= g_random << 13;
    g_random ^= g_random >> 17;
    g_random ^= g_random << 5;
    return g_random;
}

typedef std::vector<unsigned char> Bytes;

// Random finite numbers of a dtype; 16-bit ones of both formats are small, whatever their bits mean.
Bytes numbers(int32_t dtype, int64_t n, bool positive) {
    Bytes out(n * (dtype == DS_F32 ? 4 : 2) + 1);
    for (int64_t i = 0; i < n; ++i) {
        const float f = (float)(random_bits() % 20001) / 10000 - (positive ? 0 : 1);
        uint32_t u;
        memcpy(&u, &f, 4);
        const uint16_t half =
            dtype == DS_BF16 ? (uint16_t)(u >> 16)
                             : (uint16_t)((random_bits() & (positive ? 0x3fff : 0xbfff)));
        if (dtype == DS_F32)
            memcpy(&out[i * 4], &f, 4);
        else
            memcpy(&out[i * 2], &half, 2);
    }
    return out;
}

// Any bits but those of infinities and NaN: among them the least and the greatest numbers there are.
Bytes wild(int32_t dtype, int64_t n) {
    const uint32_t odd = dtype == DS_F32 ? 0x7f800000 : dtype == DS_BF16 ? 0x7f80 : 0x7c00;
    const int64_t each = dtype == DS_F32 ? 4 : 2;
    Bytes out(n * each);
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits = random_bits();
        if ((bits & odd) == odd) bits ^= odd;
        if (i / 64 % 4 == 1) bits &= ~(odd & odd << 1);  // whole groups of tiny ones
        memcpy(&out[i * each], &bits, each);
    }
    return out;
}

struct Problem {
    int64_t n;
    int32_t p, s, g, low;
};

struct Result {
    Bytes param, first, second, low;
    double norm;

    bool operator==(const Result &o) const {
        return param == o.param && first == o.first && second == o.second && low == o.low &&
               memcmp(&norm, &o.norm, sizeof norm) == 0;
    }
};

int g_failures = 0;

void check(int status, const char *what) {
    if (status == DS_OK) return;
    printf("%s: %d %s\n", what, status, ds_last_error());
    ++g_failures;
}

Result solve(const Problem &problem, const Result &start, const Bytes &grad, uint32_t threads) {
    Result r = start;
    ds_adam_args adam = {};
    adam.size = sizeof adam;
    adam.threads = threads;
    adam.numel = problem.n;
    adam.param = r.param.data();
    adam.exp_avg = r.first.data();
    adam.exp_avg_sq = r.second.data();
    adam.grad = grad.data();
    adam.low = problem.low < 0 ? nullptr : r.low.data();
    adam.param_dtype = problem.p;
    adam.state_dtype = problem.s;
    adam.grad_dtype = problem.g;
    adam.low_dtype = problem.low < 0 ? 0 : problem.low;
    adam.decoupled = 1;
    adam.bias_correction = 1;
    adam.step = 3;
    adam.lr = 0.01;
    adam.beta1 = 0.9;
    adam.beta2 = 0.99;
    adam.eps = 1e-6;
    adam.decay = 0.1;
    adam.grad_scale = 0.5;
    check(ds_adam_step(&adam), "adam");

    ds_adagrad_args adagrad = {};
    adagrad.size = sizeof adagrad;
    adagrad.threads = threads;
    adagrad.numel = problem.n;
    adagrad.param = adam.param;
    adagrad.exp_avg_sq = adam.exp_avg_sq;
    adagrad.grad = adam.grad;
    adagrad.param_dtype = problem.p;
    adagrad.state_dtype = problem.s;
    adagrad.grad_dtype = problem.g;
    adagrad.lr = 0.01;
    adagrad.eps = 1e-6;
    adagrad.decay = 0.1;
    adagrad.grad_scale = 1;
    check(ds_adagrad_step(&adagrad), "adagrad");

    ds_lion_args lion = {};
    lion.size = sizeof lion;
    lion.threads = threads;
    lion.numel = problem.n;
    lion.param = adam.param;
    lion.exp_avg = adam.exp_avg;
    lion.grad = adam.grad;
    lion.low = adam.low;
    lion.param_dtype = problem.p;
    lion.state_dtype = problem.s;
    lion.grad_dtype = problem.g;
    lion.low_dtype = adam.low_dtype;
    lion.lr = 0.01;
    lion.beta1 = 0.3;
    lion.beta2 = 0.9;
    lion.decay = 0.1;
    lion.grad_scale = 1;
    check(ds_lion_step(&lion), "lion");

    ds_norm_args norm = {};
    norm.size = sizeof norm;
    norm.threads = threads;
    norm.numel = problem.n;
    norm.x = adam.param;
    norm.x_dtype = problem.p;
    norm.out = &r.norm;
    check(ds_squared_norm(&norm), "norm");
    return r;
}

// Everything that a path makes of the same numbers by the kernels that are no optimizer rules.
struct Made {
    std::vector<Bytes> parts;

    Bytes &room(int64_t bytes) {
        parts.emplace_back((size_t)bytes);
        return parts.back();
    }
    bool operator==(const Made &o) const { return parts == o.parts; }
};

void steps(Made &made, int64_t n, int32_t dtype, const Bytes &x, const Bytes &grad) {
    Bytes p = x, m = x, v = numbers(DS_F32, n, true), ratio(4);
    for (unsigned char &byte : v) byte &= 0x3f;  // the same for each path: small and positive
    ds_sgd_args sgd = {};
    sgd.size = sizeof sgd;
    sgd.threads = 2;
    sgd.numel = n;
    sgd.param = p.data();
    sgd.exp_avg = m.data();
    sgd.grad = grad.data();
    sgd.param_dtype = sgd.state_dtype = sgd.grad_dtype = dtype;
    sgd.nesterov = 1;
    sgd.lr = 0.01;
    sgd.momentum = 0.9;
    sgd.decay = 0.1;
    sgd.grad_scale = 0.5;
    check(ds_sgd_step(&sgd), "sgd");
    sgd.momentum = 0;
    check(ds_sgd_step(&sgd), "sgd without momentum");
    if (dtype == DS_F32) {
        ds_lamb_args lamb = {};
        lamb.size = sizeof lamb;
        lamb.threads = 3;
        lamb.numel = n;
        lamb.param = p.data();
        lamb.exp_avg = m.data();
        lamb.exp_avg_sq = v.data();
        lamb.grad = grad.data();
        lamb.ratio = ratio.data();
        lamb.bias_correction = 1;
        lamb.step = 2;
        lamb.lr = 0.01;
        lamb.beta1 = 0.9;
        lamb.beta2 = 0.99;
        lamb.eps = 1e-6;
        lamb.decay = 0.1;
        lamb.least = 0.01;
        lamb.most = 10;
        lamb.grad_scale = 0.5;
        check(ds_lamb_step(&lamb), "lamb");
    }
    for (const Bytes *part : {&p, &m, &ratio}) made.parts.push_back(*part);
}

void codes(Made &made, int64_t groups, int64_t size, int64_t columns, int32_t dtype, const Bytes &x) {
    const int32_t formats[][2] = {{4, 3}, {3, 2}, {4, 7}, {2, 1}};
    const int64_t n = groups * size, each = dtype == DS_F32 ? 4 : 2;
    for (int kind = 0; kind < 24; ++kind) {
        const int32_t bits = kind % 3 == 0 ? 8 : kind % 3 == 1 ? 4 : 6;
        const bool weights = kind / 3 % 2 != 0, asym = kind / 6 % 2 != 0;
        const bool chance = kind / 12 != 0 && !weights;
        if (columns > 1 && !weights) continue;
        Bytes &to = made.room(n * bits / 8);
        ds_quantize_args q = {};
        q.size = sizeof q;
        q.threads = 2;
        q.groups = groups;
        q.group_size = size;
        q.columns = columns;
        q.x = (void *)x.data();
        q.codes = to.data();
        Bytes scale(groups * 8), least(groups * 4), out(n * each);
        q.scale = scale.data();
        q.least = least.data();
        q.x_dtype = dtype;
        q.bits = bits;
        q.asym = asym;
        q.weights = weights;
        q.stochastic = chance;
        q.seed = 5;
        check(ds_quantize(&q), "quantize");
        ds_dequantize_args d = {};
        d.size = sizeof d;
        d.threads = 2;
        d.groups = groups;
        d.group_size = size;
        d.columns = columns;
        d.codes = to.data();
        d.scale = scale.data();
        d.least = least.data();
        d.out = out.data();
        d.out_dtype = dtype;
        d.side_dtype = weights ? dtype : (int32_t)DS_F32;
        d.bits = bits;
        d.asym = asym;
        d.weights = weights;
        check(ds_dequantize(&d), "dequantize");
        for (const Bytes *part : {&scale, &least, &out}) made.parts.push_back(*part);
    }
    for (int kind = 0; kind < 8 && columns == 1; ++kind) {
        const int32_t *form = formats[kind % 4];
        const int32_t bits = 1 + form[0] + form[1];
        Bytes packed(groups * (size * bits / 8 + 4)), out(n * each);
        ds_fp_quantize_args q = {};
        q.size = sizeof q;
        q.threads = 2;
        q.groups = groups;
        q.group_size = size;
        q.x = x.data();
        q.out = packed.data();
        q.x_dtype = dtype;
        q.exponent = form[0];
        q.mantissa = form[1];
        q.stochastic = kind / 4;
        q.seed = 5;
        check(ds_fp_quantize(&q), "fp_quantize");
        ds_fp_dequantize_args d = {};
        d.size = sizeof d;
        d.threads = 2;
        d.groups = d.there = groups;
        d.group_size = size;
        d.packed = packed.data();
        d.out = out.data();
        d.row_groups = 1;
        d.out_dtype = dtype;
        d.exponent = form[0];
        d.mantissa = form[1];
        check(ds_fp_dequantize(&d), "fp_dequantize");
        for (const Bytes *part : {&packed, &out}) made.parts.push_back(*part);
    }
}

void casts(Made &made, int64_t n, int32_t dtype, const Bytes &x) {
    const int32_t others[] = {DS_F32, DS_BF16, DS_F16, DS_E4M3, DS_E5M2};
    for (int32_t to : others) {
        const int64_t each = to == DS_F32 ? 4 : to <= DS_F16 ? 2 : 1;
        Bytes out(n * each), back(n * (dtype == DS_F32 ? 4 : 2));
        ds_cast_args cast = {sizeof cast, 2, n, x.data(), out.data(), dtype, to};
        check(ds_cast(&cast), "cast");
        ds_cast_args again = {sizeof again, 2, n, out.data(), back.data(), to, dtype};
        check(ds_cast(&again), "cast back");
        made.parts.push_back(out);
        made.parts.push_back(back);
    }
}

Made make(int32_t dtype, const Bytes &x, const Bytes &grad, const Bytes &odd) {
    Made made;
    codes(made, 32, 64, 1, dtype, odd);
    codes(made, 2, 1024, 1, dtype, odd);
    steps(made, 2055, dtype, x, grad);
    codes(made, 5, 36, 1, dtype, x);
    codes(made, 2, 1028, 1, dtype, x);
    codes(made, 44, 12, 44, dtype, x);
    casts(made, 2055, dtype, x);
    return made;
}

int compare_rest(const std::vector<std::string> &paths) {
    int compared = 0;
    for (int32_t dtype : {DS_F32, DS_BF16, DS_F16}) {
        const Bytes x = numbers(dtype, 2056, false), grad = numbers(dtype, 2056, false);
        const Bytes odd = wild(dtype, 2048);
        const uint32_t seed = g_random;
        ds_set_isa("scalar");
        const Made expected = make(dtype, x, grad, odd);
        for (const std::string &path : paths) {
            ds_set_isa(path.c_str());
            g_random = seed;
            const Made got = make(dtype, x, grad, odd);
            ++compared;
            for (size_t i = 0; i < expected.parts.size(); ++i)
                if (got.parts[i] != expected.parts[i]) {
                    printf("%s differs: dtype %d, part %zu\n", path.c_str(), (int)dtype, i);
                    ++g_failures;
                }
        }
    }
    return compared;
}

}  // namespace

int main() {
    std::vector<std::string> paths;
    const char *list = ds_isa_list();
    for (const char *word = list; *word;) {
        const size_t length = strcspn(word, " ");
        paths.emplace_back(word, length);
        word += length + (word[length] == ' ');
    }
    const int64_t sizes[] = {0, 1, 15, 33, 70001};
    int compared = 0;
    for (int64_t n : sizes) {
        for (int mix = 0; mix < 27 * 4; ++mix) {
            if (mix % (n > 5000 ? 29 : 5)) continue;
            const Problem problem = {n, mix % 3, mix / 3 % 3, mix / 9 % 3, mix / 27 - 1};
            Result start = {numbers(problem.p, n, false), numbers(problem.s, n, false),
                            numbers(problem.s, n, true),
                            Bytes(n * (problem.low == DS_F32 ? 4 : 2)), 0};
            const Bytes grad = numbers(problem.g, n, false);
            ds_set_isa("scalar");
            const Result expected = solve(problem, start, grad, 1);
            if (!isfinite(expected.norm)) printf("not finite: size %lld\n", (long long)n), ++g_failures;
            for (const std::string &path : paths) {
                ds_set_isa(path.c_str());
                Result seen[3];
                seen[0] = solve(problem, start, grad, 1);
                seen[1] = solve(problem, start, grad, 3);
                std::thread other([&] { seen[2] = solve(problem, start, grad, 2); });
                const Result same_time = solve(problem, start, grad, 2);
                other.join();
                for (const Result &result : {seen[0], seen[1], seen[2], same_time}) {
                    ++compared;
                    if (result == expected) continue;
                    printf("%s differs: size %lld, mix %d\n", path.c_str(), (long long)n, mix);
                    ++g_failures;
                }
            }
        }
    }
    compared += compare_rest(paths);
    printf("paths %s: %d results compared, %d failures\n", list, compared, g_failures);
    return g_failures != 0;
}
