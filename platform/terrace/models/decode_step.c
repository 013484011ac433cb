/* One decoding step of a language model of the usual kind, in float32 on a CPU: everything between token and logits in one call.
 *
 * compiled_step.py compiles this file for HEAD (size of an attention head) and SHARE (query heads that share keys and values), and says
 * what the fields are. Matrix products are those of the BLAS that torch brings (`sgemm`). A row is one sequence; `place[m]` is where the
 * m-th of the rows that decode lies in the cache, rows with the same prompt one after another, so that a prompt meets its rows in one
 * product. Softmax runs over prompt and answer together, with the largest score taken off.
 */
#include <stdint.h>
#include <string.h>

typedef void (*gemm_t)(const char *, const char *, const int *, const int *, const int *, const float *, const float *, const int *,
                       const float *, const int *, const float *, float *, const int *);

struct layer {
    const float *query, *query_bias, *key, *key_bias, *value, *value_bias, *out, *out_bias, *query_norm, *key_norm, *before, *after, *gate,
        *up, *down;
    const float *prompt_keys, *prompt_values; /* [B, KV, prompt_room, HEAD] */
    float *own_keys, *own_values;             /* [R, KV, own_room, HEAD] */
    int64_t prompt_room, own_room, window;    /* window: how far back a token sees, 0 without bound */
};

struct step {
    gemm_t gemm;
    int64_t rows, layers, hidden, inner, heads, kv_heads, vocabulary;
    float epsilon, scale;
    const struct layer *layer;
    const float *embeddings, *norm, *head, *head_bias, *cosines, *sines; /* tables by position [.., HEAD] */
    const int64_t *tokens, *positions, *place, *lengths; /* [rows]: lengths: tokens of the answer before this one */
    const int64_t *prompt, *prompt_length;               /* [rows] */
    float *states, *read, *wide, *heads_out, *scores;    /* room: [rows, hidden] twice, [rows, 2 inner or more], [rows, heads HEAD], scores */
    int64_t score_room;                                  /* floats for the scores of one row of one key head, times SHARE */
    float *logits;                                       /* [rows, vocabulary], in the order of `order` */
    const int64_t *order;                                /* [rows]: the m-th row of the logits */
};

/* out [rows, to] = (keep: out, or bias, or 0) + in [rows, from] weight [to, from]^T */
static void linear(gemm_t gemm, int64_t rows, int64_t to, int64_t from, const float *in, const float *weight, const float *bias, float *out,
                   int keep) {
    const int n = (int)to, m = (int)rows, k = (int)from;
    const float one = 1.0f, beta = keep || bias ? 1.0f : 0.0f;
    if (bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < to; c++) out[r * to + c] = bias[c] + (keep ? out[r * to + c] : 0.0f);
    gemm("T", "N", &n, &m, &k, &one, weight, &k, in, &k, &beta, out, &n);
}

static void normal(int64_t rows, int64_t width, const float *in, const float *weight, float epsilon, float *out) {
    for (int64_t r = 0; r < rows; r++) {
        const float *from = in + r * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; c++) sum += from[c] * from[c];
        const float factor = 1.0f / __builtin_sqrtf(sum / (float)width + epsilon);
        for (int64_t c = 0; c < width; c++) out[r * width + c] = from[c] * factor * weight[c];
    }
}

/* e^x for x <= 88, about 1e-7 off: 2^n by the exponent's bits times a polynomial on [-ln 2 / 2, ln 2 / 2] */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float whole = __builtin_rintf(x * 1.44269504f);
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { float value; int32_t bits; } power;
    power.bits = ((int32_t)whole + 127) << 23;
    return p * power.value;
}

/* each head turned by its position, in place, times `scale` */
static void turn(int64_t heads, float *states, const float *cosines, const float *sines, float scale) {
    for (int64_t h = 0; h < heads; h++) {
        float *state = states + h * HEAD;
        for (int c = 0; c < HEAD / 2; c++) {
            const float low = state[c], high = state[c + HEAD / 2];
            state[c] = (low * cosines[c] + high * sines[c]) * scale;
            state[c + HEAD / 2] = (high * cosines[c + HEAD / 2] + low * sines[c + HEAD / 2]) * scale;
        }
    }
}

/* attention of SHARE query heads of one row to its own keys [first, last), whose scores go to scores[..][at ..) */
static void own_scores(const float *query, const float *keys, int64_t first, int64_t last, float *scores, int64_t room) {
    for (int64_t t = first; t < last; t++)
        for (int s = 0; s < SHARE; s++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int c = 0; c < HEAD; c++) sum += query[s * HEAD + c] * keys[t * HEAD + c];
            scores[s * room + t - first] = sum;
        }
}

/* scores [count] become weights that sum to 1 */
static void soften(float *scores, int64_t count) {
    float most = scores[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < count; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < count; t++) {
        scores[t] = exponential(scores[t] - most);
        sum += scores[t];
    }
    const float factor = 1.0f / sum;
    for (int64_t t = 0; t < count; t++) scores[t] *= factor;
}

/* rows [begin, end) have one prompt; query [rows, heads, HEAD] is turned and scaled, out as query */
static void attend(const struct step *step, const struct layer *layer, int64_t begin, int64_t end, const float *query,
                   float *out) {
    const int64_t kv = step->kv_heads, count = end - begin, length = step->prompt_length[begin], room = step->score_room;
    const int size = HEAD, queries = (int)(count * SHARE), stride = (int)room;
    const float one = 1.0f, none = 0.0f;
    float *packed = step->scores, *scores = packed + count * SHARE * HEAD, *found = scores + count * SHARE * room;
    /* of the prompt, what the row that sees furthest back sees; what a window hides from the others gets the weight 0 */
    int64_t first = length;
    for (int64_t m = begin; m < end; m++) {
        const int64_t from = layer->window ? length + step->lengths[m] + 1 - layer->window : 0;
        first = from < first ? from : first;
    }
    first = first < 0 ? 0 : first;
    const int shown = (int)(length - first);
    for (int64_t h = 0; h < kv; h++) {
        const int64_t at = (step->prompt[begin] * kv + h) * layer->prompt_room + first;
        for (int64_t m = begin; m < end; m++)
            memcpy(packed + (m - begin) * SHARE * HEAD, query + (m * kv + h) * SHARE * HEAD, sizeof(float) * SHARE * HEAD);
        if (shown > 0)
            step->gemm("T", "N", &shown, &queries, &size, &one, layer->prompt_keys + at * HEAD, &size, packed, &size, &none, scores, &stride);
        for (int64_t m = begin; m < end; m++) {
            const int64_t own = (step->place[m] * kv + h) * layer->own_room, last = step->lengths[m] + 1;
            const int64_t back = layer->window ? last - layer->window : 0, from = back < 0 ? 0 : back, seen = last - from;
            const int64_t hidden = layer->window && length + back > first ? length + back - first : 0;
            float *row = scores + (m - begin) * SHARE * room;
            own_scores(packed + (m - begin) * SHARE * HEAD, layer->own_keys + own * HEAD, from, last, row + shown, room);
            for (int s = 0; s < SHARE; s++) {
                float *line = row + s * room;
                for (int64_t t = 0; t < hidden && t < shown; t++) line[t] = -1e30f;
                soften(line, shown + seen);
            }
        }
        if (shown > 0)
            step->gemm("N", "N", &size, &queries, &shown, &one, layer->prompt_values + at * HEAD, &size, scores, &stride, &none, found, &size);
        else
            memset(found, 0, sizeof(float) * (size_t)(count * SHARE * HEAD));
        for (int64_t m = begin; m < end; m++) {
            const int64_t own = (step->place[m] * kv + h) * layer->own_room, last = step->lengths[m] + 1;
            const int64_t back = layer->window ? last - layer->window : 0, from = back < 0 ? 0 : back;
            for (int s = 0; s < SHARE; s++) {
                const float *weights = scores + ((m - begin) * SHARE + s) * room + shown;
                float sum[HEAD];
                memcpy(sum, found + ((m - begin) * SHARE + s) * HEAD, sizeof sum);
                for (int64_t t = from; t < last; t++)
#pragma omp simd
                    for (int c = 0; c < HEAD; c++) sum[c] += weights[t - from] * layer->own_values[(own + t) * HEAD + c];
                memcpy(out + ((m * kv + h) * SHARE + s) * HEAD, sum, sizeof sum);
            }
        }
    }
}

void decode_step(const struct step *step) {
    const int64_t rows = step->rows, hidden = step->hidden, inner = step->inner, queries = step->heads * HEAD, pairs = step->kv_heads * HEAD;
    float *states = step->states, *read = step->read;
    for (int64_t m = 0; m < rows; m++)
        memcpy(states + m * hidden, step->embeddings + step->tokens[m] * hidden, sizeof(float) * (size_t)hidden);
    for (int64_t number = 0; number < step->layers; number++) {
        const struct layer *layer = step->layer + number;
        float *query = step->wide, *key = query + rows * queries, *value = key + rows * pairs;
        normal(rows, hidden, states, layer->before, step->epsilon, read);
        linear(step->gemm, rows, queries, hidden, read, layer->query, layer->query_bias, query, 0);
        linear(step->gemm, rows, pairs, hidden, read, layer->key, layer->key_bias, key, 0);
        linear(step->gemm, rows, pairs, hidden, read, layer->value, layer->value_bias, value, 0);
        if (layer->query_norm) {
            normal(rows * step->heads, HEAD, query, layer->query_norm, step->epsilon, query);
            normal(rows * step->kv_heads, HEAD, key, layer->key_norm, step->epsilon, key);
        }
        for (int64_t m = 0; m < rows; m++) {
            const float *cosines = step->cosines + step->positions[m] * HEAD, *sines = step->sines + step->positions[m] * HEAD;
            turn(step->heads, query + m * queries, cosines, sines, step->scale);
            turn(step->kv_heads, key + m * pairs, cosines, sines, 1.0f);
            for (int64_t h = 0; h < step->kv_heads; h++) {
                const int64_t at = ((step->place[m] * step->kv_heads + h) * layer->own_room + step->lengths[m]) * HEAD;
                memcpy(layer->own_keys + at, key + m * pairs + h * HEAD, sizeof(float) * HEAD);
                memcpy(layer->own_values + at, value + m * pairs + h * HEAD, sizeof(float) * HEAD);
            }
        }
        for (int64_t begin = 0, end; begin < rows; begin = end) {
            for (end = begin + 1; end < rows && step->prompt[end] == step->prompt[begin]; end++) {}
            attend(step, layer, begin, end, query, step->heads_out);
        }
        linear(step->gemm, rows, hidden, queries, step->heads_out, layer->out, layer->out_bias, states, 1);
        normal(rows, hidden, states, layer->after, step->epsilon, read);
        float *gate = step->wide, *up = gate + rows * inner;
        linear(step->gemm, rows, inner, hidden, read, layer->gate, 0, gate, 0);
        linear(step->gemm, rows, inner, hidden, read, layer->up, 0, up, 0);
#pragma omp simd
        for (int64_t c = 0; c < rows * inner; c++) gate[c] = gate[c] / (1.0f + exponential(-gate[c])) * up[c];
        linear(step->gemm, rows, hidden, inner, gate, layer->down, 0, states, 1);
    }
    for (int64_t m = 0; m < rows; m++) normal(1, hidden, states + step->order[m] * hidden, step->norm, step->epsilon, read + m * hidden);
    linear(step->gemm, rows, step->vocabulary, hidden, read, step->head, step->head_bias, step->logits, 0);
}
