// moe_layer_picture.h - the picture (SVG) and the page (HTML) that moe_layer.c writes; included there, after `job`
//
// Both are self-contained: no scripts, fonts or pictures from elsewhere. Colours follow the light or dark mode.

static void escaped(FILE *f, const char *text, int limit) // at most `limit` characters, for XML
{
    int n = 0;
    for (; *text != 0; text++) {
        if (((unsigned char)*text & 0xc0) != 0x80 && n++ == limit) { fputs("...", f); return; }
        if (*text == '<') fputs("&lt;", f);
        else if (*text == '>') fputs("&gt;", f);
        else if (*text == '&') fputs("&amp;", f);
        else if (*text == '"') fputs("&quot;", f);
        else putc((unsigned char)*text < 32 ? ' ' : *text, f);
    }
}

// Height of an error on the axis from 1e-8 to 1e-4, 0 to 1. Octaves are equal steps, straight inside.
static double error_height(double v)
{
    int e_low, e_high, e;
    double low = frexp(1e-8, &e_low), high = frexp(1e-4, &e_high), m = frexp(v, &e), h;
    h = (e + 2 * m - e_low - 2 * low) / (e_high + 2 * high - e_low - 2 * low);
    return v <= 0 || h < 0 ? 0 : h > 1 ? 1 : h;
}

static const char picture_style[] =
    "text{font:12px system-ui,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328}"
    ".t{font-size:20px;font-weight:600}"                                        // title
    ".h{font-weight:600}"                                                       // heads
    ".m{fill:#59636e;font-size:11px}"                                           // minor text
    ".k{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:11.5px}" // members and values
    ".e{text-anchor:end}"
    ".c{fill:#0a5fb4}.s{stop-color:#0a5fb4}"                                    // data
    ".bg{fill:#eef2f6}.g{stroke:#d4dbe2;fill:none}"                             // ground, grid
    ".d{stroke:#bc4c00;stroke-dasharray:4 3;fill:none}"                         // limits and means
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.m{fill:#9aa5b1}.c{fill:#6cb2ff}.s{stop-color:#6cb2ff}"
    ".bg{fill:#1c232c}.g{stroke:#313a45}.d{stroke:#f0a15e}}";

static const char page_style[] =
    ":root{color-scheme:light dark}"
    "body{font:15px/1.5 system-ui,'Segoe UI',sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;"
    "color:#1f2328;background:#fff}"
    "svg{width:100%;height:auto}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "th,td{text-align:left;padding:.2rem 1.2rem .2rem 0;border-bottom:1px solid #d4dbe2}"
    "caption{text-align:left;font-weight:600;padding:.3rem 0}"
    "code{font-family:ui-monospace,monospace;font-size:.92em}"
    "@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}th,td{border-color:#313a45}}";

enum { WIDTH = 960, LEFT = 68, MAP = 600, LOAD_X = 712, LOAD = 190, FACT_ROW = 19, ERROR = 84, SHOWN_TOKENS = 128 };

typedef struct frame { // of the picture, in pixels
    int32_t tokens, experts, fact_rows, map_y;
    double column, row, map_height, most_weight;
} frame;

static frame frame_make(const job *j, int facts)
{
    frame p;
    p.tokens = j->tokens < SHOWN_TOKENS ? j->tokens : SHOWN_TOKENS;
    p.experts = j->width > j->layer.num_experts ? j->width : j->layer.num_experts;
    p.fact_rows = facts ? (j->num_facts + 1) / 2 : 0;
    p.map_y = 112 + (facts ? p.fact_rows * FACT_ROW + 30 : 0);
    p.column = (double)MAP / p.tokens < 20 ? (double)MAP / p.tokens : 20;
    p.row = 960.0 / p.experts < 15 ? 960.0 / p.experts : 15;
    p.map_height = p.row * p.experts;
    p.most_weight = 0;
    for (int32_t i = 0; i < p.tokens * j->slots; i++)
        if (absolute(j->chosen_weights[i]) > p.most_weight) p.most_weight = absolute(j->chosen_weights[i]);
    if (!(p.most_weight > 0)) p.most_weight = 1;
    return p;
}

static void picture_map(FILE *f, const job *j, const frame *p)
{
    fprintf(f, "<text class='h' x='%d' y='%d'>routing weight</text>\n", LEFT, p->map_y - 14);
    fprintf(f, "<text class='m e' x='%d' y='%d'>0</text><rect x='%d' y='%d' width='110' height='9' fill='url(#ramp)'/>"
            "<text class='m' x='%d' y='%d'>%.2f</text>\n", LEFT + MAP - 162, p->map_y - 14, LEFT + MAP - 156,
            p->map_y - 23, LEFT + MAP - 40, p->map_y - 14, p->most_weight);
    fprintf(f, "<rect class='bg' x='%d' y='%d' width='%.1f' height='%.1f'/>\n", LEFT, p->map_y, p->column * p->tokens,
            p->map_height);
    for (int32_t i = 0; i < p->tokens * j->slots; i++) {
        int32_t t = i / j->slots, e = j->chosen_ids[i];
        if (e < 0) continue;
        fprintf(f, "<rect class='c' x='%.2f' y='%.2f' width='%.2f' height='%.2f' fill-opacity='%.3f'><title>token %d,"
                " expert %d: %.4f</title></rect>\n", LEFT + t * p->column + 0.5, p->map_y + e * p->row + 0.5,
                p->column > 2 ? p->column - 1 : p->column, p->row > 2 ? p->row - 1 : p->row,
                0.2 + 0.8 * absolute(j->chosen_weights[i]) / p->most_weight, t, e, j->chosen_weights[i]);
    }
    for (int32_t e = 0, step = p->row >= 12 ? 1 : (int32_t)(12 / p->row) + 1; e < p->experts; e += step)
        fprintf(f, "<text class='m e' x='%d' y='%.1f'>%d</text>\n", LEFT - 6, p->map_y + (e + 0.5) * p->row + 4, e);
    fprintf(f, "<text class='m' transform='translate(24 %.1f) rotate(-90)' text-anchor='middle'>expert</text>\n",
            p->map_y + p->map_height / 2);
    for (int32_t t = 0; t < p->tokens; t += p->tokens > 16 ? 8 : 2)
        fprintf(f, "<text class='m' text-anchor='middle' x='%.1f' y='%.1f'>%d</text>\n", LEFT + (t + 0.5) * p->column,
                p->map_y + p->map_height + 15, t);
    fprintf(f, "<text class='m e' x='%d' y='%.1f'>token</text>\n", LEFT - 6, p->map_y + p->map_height + 15);
}

static void picture_load(FILE *f, const job *j, const frame *p)
{
    int32_t most = j->counts[busiest(j)] > 0 ? j->counts[busiest(j)] : 1, total = 0;
    double mean;
    for (int32_t e = 0; e < j->layer.num_experts; e++) {
        total += j->counts[e];
        fprintf(f, "<rect class='c' x='%d' y='%.2f' width='%.1f' height='%.2f'><title>expert %d: %d tokens</title>"
                "</rect>\n", LOAD_X, p->map_y + e * p->row + 0.5, (double)LOAD * j->counts[e] / most,
                p->row > 2 ? p->row - 1 : p->row, e, j->counts[e]);
        if (p->row >= 12)
            fprintf(f, "<text class='m e' x='%d' y='%.1f'>%d</text>\n", LOAD_X + LOAD + 34,
                    p->map_y + (e + 0.5) * p->row + 4, j->counts[e]);
    }
    mean = (double)total / j->layer.num_experts;
    fprintf(f, "<text class='h' x='%d' y='%d'>load: tokens per expert</text>\n<path class='d' d='M%.1f %d v%.1f'/>\n"
            "<text class='m' text-anchor='middle' x='%.1f' y='%.1f'>mean %.4g</text>\n", LOAD_X, p->map_y - 14,
            LOAD_X + LOAD * mean / most, p->map_y - 2, p->map_height + 4, LOAD_X + LOAD * mean / most,
            p->map_y + p->map_height + 15, mean);
}

static void picture_errors(FILE *f, const job *j, const frame *p)
{
    static const char *ticks[5] = { "1e-8", "1e-7", "1e-6", "1e-5", "1e-4" };
    double top = p->map_y + p->map_height + 56, width = p->column * p->tokens;
    fprintf(f, "<text class='h' x='%d' y='%.1f'>error of each token against golden.safetensors, relative to its largest"
            " output</text>\n", LEFT, top - 12);
    fprintf(f, "<rect class='bg' x='%d' y='%.1f' width='%.1f' height='%d'/>\n", LEFT, top, width, ERROR);
    for (int i = 0; i < 5; i++) {
        double y = top + ERROR * (1 - error_height(strtod(ticks[i], NULL)));
        fprintf(f, "<text class='m e' x='%d' y='%.1f'>%s</text><path class='%s' d='M%d %.1f h%.1f'/>\n", LEFT - 6,
                y + 4, ticks[i], i == 3 ? "d" : "g", LEFT, y, width);
        if (i == 3)
            fprintf(f, "<text class='m' x='%.1f' y='%.1f'>allowed: 1e-5</text>\n"
                    "<text class='m' x='%.1f' y='%.1f'>largest: %.1e</text>\n", LEFT + width + 10, y + 4,
                    LEFT + width + 10, top + ERROR * (1 - error_height(j->worst)) + 4, j->worst);
    }
    for (int32_t t = 0; t < p->tokens; t++)
        fprintf(f, "<circle class='c' cx='%.2f' cy='%.2f' r='%.2f'><title>token %d: %.2e</title></circle>\n",
                LEFT + (t + 0.5) * p->column, top + ERROR * (1 - error_height(j->errors[t])),
                p->column > 7 ? 3.0 : p->column / 2.3, t, j->errors[t]);
}

// The same figure stands alone (facts = 1, no times in it) and in the page.
static void picture(FILE *f, const job *j, int facts)
{
    frame p = frame_make(j, facts);
    const moe_layer_desc *l = &j->layer;
    int height = (int)(p.map_y + p.map_height + (j->errors != NULL ? 56 + ERROR + 20 : 32));
    fprintf(f, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' role='img' aria-labelledby='pt pd'>\n",
            WIDTH, height);
    fprintf(f, "<title id='pt'>Routing, load and error of one MoE layer</title>\n<desc id='pd'>%d tokens over %d"
            " experts, %d per token; the busiest expert has %d tokens", j->tokens, l->num_experts, l->routing.top_k,
            j->counts[busiest(j)]);
    if (j->errors != NULL) fprintf(f, "; the largest error is %.1e of a row's maximum", j->worst);
    fprintf(f, ".</desc>\n<style>%s</style>\n<defs><linearGradient id='ramp'><stop class='s' offset='0'"
            " stop-opacity='0.2'/><stop class='s' offset='1'/></linearGradient></defs>\n", picture_style);
    fprintf(f, "<text class='t' x='24' y='36'>");
    escaped(f, j->folder, 60);
    fprintf(f, ", layer %d</text>\n<text class='m' x='24' y='58'>%d experts, %d per token, hidden %d, intermediate %d,"
            " %s, %s, routing %s; read from the checkpoint's own files</text>\n", j->index, l->num_experts,
            l->routing.top_k, l->hidden_size, l->intermediate_size, moe_format_string(l->format),
            moe_activation_string(l->activation.kind),
            moe_routing_method_string(moe_routing_method_of(&l->routing)));
    for (int x = 24; facts && x < 600; x += 468)
        fprintf(f, "<text class='h' x='%d' y='92'>inferred</text><text class='h' x='%d' y='92'>value</text>"
                "<text class='h' x='%d' y='92'>from</text>\n", x, x + 192, x + 300);
    for (int32_t i = 0; facts && i < j->num_facts; i++) {
        int x = 24 + i / p.fact_rows * 468, y = 112 + i % p.fact_rows * FACT_ROW;
        fprintf(f, "<text class='k' x='%d' y='%d'>", x, y);
        escaped(f, j->facts[i].name, 26);
        fprintf(f, "</text><text class='k' x='%d' y='%d' font-weight='600'>", x + 192, y);
        escaped(f, j->facts[i].value, 14);
        fprintf(f, "</text><text class='m' x='%d' y='%d'>", x + 300, y);
        escaped(f, j->facts[i].source, 25);
        fprintf(f, "</text>\n");
    }
    picture_map(f, j, &p);
    picture_load(f, j, &p);
    if (j->errors != NULL) picture_errors(f, j, &p);
    fprintf(f, "</svg>\n");
}

static void page(FILE *f, const job *j)
{
    fprintf(f, "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<meta name='viewport' content="
            "'width=device-width,initial-scale=1'>\n<title>");
    escaped(f, j->folder, 80);
    fprintf(f, ", layer %d</title>\n", j->index);
    fprintf(f, "<style>%s</style>\n</head>\n<body>\n<main>\n<h1>One MoE layer</h1>\n<p>", page_style);
    fprintf(f, "%d tokens from ", j->tokens);
    escaped(f, j->x_source, 200);
    fprintf(f, " through layer %d of <code>", j->index);
    escaped(f, j->folder, 200);
    fprintf(f, "</code>: %.3f ms on ", j->seconds * 1e3);
    escaped(f, j->machine.name, 64);
    fprintf(f, ", %s kernels, %d threads.</p>\n<p><strong>", j->machine.isa, j->machine.threads);
    if (j->failed) escaped(f, j->verdict, 400);
    else if (j->errors == NULL) fputs("There is no golden output beside this checkpoint to compare with.", f);
    else fprintf(f, "Every token chose the experts of the golden file; the largest error is %.2e of a row's maximum "
                 "(token %d), 1e-5 is allowed.", j->worst, j->worst_token);
    fprintf(f, "</strong></p>\n");
    picture(f, j, 0);
    fprintf(f, "<table>\n<caption>What the files say</caption>\n<thead><tr><th scope='col'>member</th><th scope='col'>"
            "value</th><th scope='col'>from</th></tr></thead>\n<tbody>\n");
    for (int32_t i = 0; i < j->num_facts; i++) {
        fprintf(f, "<tr><th scope='row'><code>");
        escaped(f, j->facts[i].name, 99);
        fprintf(f, "</code></th><td>");
        escaped(f, j->facts[i].value, 99);
        fprintf(f, "</td><td>");
        escaped(f, j->facts[i].source, 99);
        fprintf(f, "</td></tr>\n");
    }
    fprintf(f, "</tbody>\n</table>\n</main>\n</body>\n</html>\n");
}

