// The DPO tab: the host's progress bar above our results, and a status line that is true whenever the tab is looked at.
// Elements are found by their id only; nothing here is needed for the tab to work.

"use strict";

const dpoLookEvery = 2000; // ms between two looks at the loaded model and the lists of files
const dpoTickEvery = 3000; // ms between two looks at the loaded model alone, while the tab is shown

// Buttons that fill the lists of the script «DPO offset» anew, and the host's list of checkpoints (AUTOMATIC1111, Forge).
const dpoScriptLists = ["script_txt2img_dpo_offset_refresh", "script_img2img_dpo_offset_refresh"];
const dpoHostLists = ["refresh_sd_model_checkpoint", "forge_refresh_checkpoint"];

function dpoElement(id) {
    const root = typeof gradioApp === "function" ? gradioApp() : document;
    return root.querySelector(`[id="${id}"]`);
}

function dpoPress(id) {
    const button = dpoElement(id);
    if (button) button.click();
}

// Called by gradio before a long job: gives it an id under which the host shows how far it is.
function dpoStart(placeId, values) {
    const place = dpoElement(placeId);
    if (place) place.setAttribute("aria-busy", "true");
    if (place && typeof requestProgress === "function" && typeof randomId === "function") {
        values[0] = randomId();
        requestProgress(values[0], place, null, function() {});
    }
    return values;
}

// Called after it: a job that was refused before it began has left a bar that would wait for it.
function dpoEnd(placeId, wrote) {
    const place = dpoElement(placeId);
    // AUTOMATIC1111 has no checkpoint for a moment while it fills its list: only where one may have been written
    const old = {offset: dpoScriptLists, checkpoint: [...dpoScriptLists, ...dpoHostLists]}[wrote] || [];
    old.forEach(dpoPress);
    if (!place) return;
    place.setAttribute("aria-busy", "false");
    setTimeout(dpoNamePictures, 500);
    setTimeout(() => dpoBringIntoView(dpoElement(`${placeId}_place`) || place), 100); // when the answer is drawn
    const bar = place.previousElementSibling;
    if (bar && bar.classList.contains("progressDiv")) bar.style.display = "none";
}

// Where what a click gave lies outside of the window, as on a narrow page.
function dpoBringIntoView(element) {
    if (!element.offsetParent) return; // another page is open meanwhile
    const {top} = element.getBoundingClientRect();
    if (top < 0 || top > 0.8 * window.innerHeight) element.scrollIntoView({behavior: "smooth", block: "start"});
}

// ---- from the card of a new file to where it is used ----

const dpoPages = ["dpo_extract", "dpo_bake", "dpo_compare", "dpo_blind", "dpo_inspect"]; // in the order of the tab

// By its id, where gradio gives it one, or else by its place: its words may be in another language.
function dpoPageButton(pageId) {
    const pages = dpoElement("dpo_pages");
    if (!pages) return null;
    const named = (id) => pages.querySelector(`[id="${id}-button"]`);
    if (named(pageId)) return named(pageId);
    const more = [...pages.querySelectorAll(".overflow-dropdown button")]; // gradio 6: those for which a narrow page has no room
    if (more.length) return more[dpoPages.filter((id) => !named(id)).indexOf(pageId)] || null;
    return pages.querySelectorAll(".tab-nav > button")[dpoPages.indexOf(pageId)] || null;
}

// Called when the list of another page of the tab has the file in it.
function dpoOpen(pageId, listId) {
    const button = dpoPageButton(pageId);
    if (button) button.click();
    setTimeout(() => {
        const list = dpoElement(listId);
        if (list) dpoBringIntoView(list);
    }, 200);
}

// Adds a LoRA to the prompt of txt2img, unless it is there, and goes there.
function dpoUseInPrompt(tag) {
    const field = dpoElement("txt2img_prompt");
    const prompt = field && field.querySelector("textarea");
    if (!prompt) return;
    if (!prompt.value.includes(tag.replace(/[^:]*>$/, ""))) {
        prompt.value = [prompt.value.trimEnd(), tag].filter(Boolean).join(" ");
        if (typeof updateInput === "function") updateInput(prompt);
        else prompt.dispatchEvent(new Event("input", {bubbles: true}));
    }
    if (typeof switch_to_txt2img === "function") switch_to_txt2img();
    setTimeout(() => dpoBringIntoView(prompt), 200);
}

document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest(".dpo-doors button");
    if (!button) return;
    if (button.dataset.dpoPress) dpoPress(button.dataset.dpoPress);
    if (button.dataset.dpoPage) dpoOpen(`dpo_${button.dataset.dpoPage}`, button.dataset.dpoTo);
    if (button.dataset.dpoPrompt) dpoUseInPrompt(button.dataset.dpoPrompt);
});

// ---- the status line ----

let dpoLookedAt = 0;

function dpoLook() {
    const button = dpoElement("dpo_shown");
    if (!button || document.hidden || Date.now() - dpoLookedAt < dpoLookEvery) return;
    dpoLookedAt = Date.now();
    button.click();
}

// The line at the foot comes with the lists.
function dpoUnanswered() {
    const foot = dpoElement("dpo_foot");
    return foot !== null && !foot.textContent.trim();
}

function dpoWatch() {
    const top = dpoElement("dpo_top");
    if (!top) return false;
    dpoName();
    dpoHideTake();
    dpoWatchScripts();
    new IntersectionObserver((entries) => {
        if (entries.some((entry) => entry.isIntersecting)) dpoLook();
    }).observe(top);
    setInterval(() => {
        const tick = dpoElement("dpo_tick");
        if (!tick || !top.offsetParent || document.hidden) return;
        if (dpoUnanswered()) dpoLook(); // a page that is still being built may not hear the first press
        tick.click();
    }, dpoTickEvery);
    setInterval(dpoBlindLook, dpoBlindEvery);
    setInterval(dpoFetchLook, dpoFetchEvery);
    document.addEventListener("visibilitychange", () => {
        if (top.offsetParent) dpoLook();
    });
    return true;
}

// The script's own lists: when it comes into sight, for files may have been written meanwhile, by the tab, the API or by hand.
function dpoWatchScripts() {
    for (const id of dpoScriptLists) {
        const button = dpoElement(id);
        if (!button) continue; // the app has no scripts
        let pressed = 0;
        new IntersectionObserver((entries) => {
            if (!entries.some((entry) => entry.isIntersecting) || Date.now() - pressed < dpoLookEvery) return;
            pressed = Date.now();
            dpoPress(id);
        }).observe(button);
    }
}

// ---- before and after ----

// The line follows the arrow keys and a finger, which move the range, and a mouse over the picture, pressed or not.
document.addEventListener("input", (event) => {
    const range = event.target;
    const wipe = range.closest && range.closest(".dpo-wipe");
    if (wipe) wipe.style.setProperty("--dpo-at", `${range.value}%`);
});

document.addEventListener("pointermove", (event) => {
    const wipe = event.pointerType === "mouse" && event.target.closest && event.target.closest(".dpo-wipe");
    const range = wipe && wipe.querySelector('input[type="range"]');
    if (!range) return;
    const {left, width} = wipe.getBoundingClientRect();
    const at = Math.min(100, Math.max(0, 100 * (event.clientX - left) / width));
    range.value = Math.round(at);
    wipe.style.setProperty("--dpo-at", `${at}%`);
});

// A cell of a comparison, large: over the untouched picture of its row, which is the first; both are zoomed alike.
document.addEventListener("click", (event) => {
    const cell = event.target.closest && event.target.closest(".dpo-cell");
    if (cell) dpoEnlarge(cell);
});

function dpoEnlarge(cell) {
    const after = cell.querySelector("img");
    const before = cell.closest("tr").querySelector("img");
    const large = document.createElement("dialog");
    const wipe = document.createElement("div");
    const range = Object.assign(document.createElement("input"), {type: "range", min: 0, max: 100, value: before === after ? 0 : 50});
    large.className = "dpo-large";
    large.setAttribute("aria-label", after.alt);
    wipe.className = "dpo-wipe";
    wipe.style.setProperty("--dpo-at", `${range.value}%`);
    range.setAttribute("aria-label", "Line between before, left, and after, right");
    wipe.append(before.cloneNode(), after.cloneNode(), range);
    const head = document.createElement("header");
    const words = Object.assign(document.createElement("p"), {textContent: after.alt});
    let times = 1;
    const fit = () => {
        const room = Math.min(0.9 * innerWidth / after.naturalWidth, 0.8 * innerHeight / after.naturalHeight);
        wipe.style.width = `${times * Math.max(room, 0.1) * after.naturalWidth}px`;
        wipe.style.maxWidth = "none";
    };
    const button = (text, press) => {
        const made = Object.assign(document.createElement("button"), {type: "button", textContent: text});
        made.addEventListener("click", press);
        return made;
    };
    const zoom = button("Zoom ×2", () => {
        times = times === 4 ? 1 : 2 * times;
        zoom.textContent = times === 4 ? "Whole picture" : `Zoom ×${2 * times}`;
        fit();
    });
    head.append(words, zoom, button("Close", () => large.close()));
    large.append(head, wipe);
    large.addEventListener("close", () => {
        large.remove();
        cell.focus();
    });
    dpoElement("dpo_tab").append(large);
    fit();
    large.showModal();
}

// ---- blind test ----

const dpoBlindEvery = 500; // ms between two looks for a pair that is being drawn
const dpoBlindKeys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "none", ArrowUp: "skip"};
const dpoMostZoom = 8;

function dpoBlind() {
    const pair = dpoElement("dpo_blind_view");
    return pair && pair.offsetParent ? pair : null;
}

// Both pictures alike: how much, and around which place of them.
function dpoZoom(pair, zoom, event) {
    const box = pair.querySelector(".dpo-blind");
    if (!box) return;
    const figure = event && event.target.closest && event.target.closest("figure[data-dpo-vote]");
    if (figure) {
        const {left, top, width, height} = figure.getBoundingClientRect();
        box.style.setProperty("--dpo-x", `${100 * (event.clientX - left) / width}%`);
        box.style.setProperty("--dpo-y", `${100 * (event.clientY - top) / height}%`);
    }
    if (zoom === null) return;
    const held = Math.min(dpoMostZoom, Math.max(1, zoom));
    box.style.setProperty("--dpo-zoom", held);
    const range = pair.querySelector(".dpo-zoom input");
    if (range) range.value = held;
}

function dpoZoomed(pair) {
    const range = pair.querySelector(".dpo-zoom input");
    return range ? Number(range.value) : 1;
}

document.addEventListener("keydown", (event) => {
    const pair = dpoBlind();
    const typing = event.target.closest && event.target.closest("input:not([type=range]), textarea, select, [role=listbox]");
    if (!pair || typing || event.ctrlKey || event.metaKey || event.altKey || !pair.querySelector(".dpo-blind")) return;
    const choice = dpoBlindKeys[event.key];
    const zoom = {"+": dpoZoomed(pair) * 1.5, "=": dpoZoomed(pair) * 1.5, "-": dpoZoomed(pair) / 1.5, "0": 1}[event.key];
    if (!choice && !zoom) return;
    event.preventDefault(); // the page would scroll
    if (zoom) dpoZoom(pair, zoom);
    else if (!event.repeat) dpoPress(`dpo_blind_${choice}`);
});

document.addEventListener("click", (event) => {
    const figure = event.target.closest && event.target.closest("figure[data-dpo-vote]");
    if (figure) dpoPress(`dpo_blind_${figure.dataset.dpoVote}`);
});

document.addEventListener("input", (event) => {
    const pair = event.target.closest && event.target.closest(".dpo-zoom") && dpoBlind();
    if (pair) dpoZoom(pair, Number(event.target.value));
});

document.addEventListener("wheel", (event) => {
    const pair = event.target.closest && event.target.closest("figure[data-dpo-vote]") && dpoBlind();
    if (!pair) return;
    event.preventDefault();
    dpoZoom(pair, dpoZoomed(pair) * (event.deltaY < 0 ? 1.25 : 0.8), event);
}, {passive: false});

document.addEventListener("pointermove", (event) => {
    const pair = event.target.closest && event.target.closest("figure[data-dpo-vote]") && dpoBlind();
    if (pair) dpoZoom(pair, null, event);
});

// A test that runs is shown when its page comes into sight, and a pair as soon as it is drawn.
let dpoBlindSeen = false;

function dpoBlindLook() {
    const pair = dpoBlind();
    const waits = pair && (!dpoBlindSeen || pair.querySelector(".dpo-waiting"));
    dpoBlindSeen = pair !== null;
    if (waits && !document.hidden) dpoPress("dpo_blind_look");
}

// ---- a reference that is being fetched ----

const dpoFetchEvery = 1000; // ms between two looks at how far it is
let dpoFetches = false;

function dpoFetchLook() {
    const view = dpoElement("dpo_references_view");
    if (!view || !view.offsetParent || document.hidden) return;
    const bar = view.querySelector(".dpo-fetching");
    if (bar) dpoPress("dpo_references_look");
    else if (dpoFetches) dpoPress("dpo_shown"); // a file has come: the lists are old
    dpoFetches = bar !== null;
}

// ---- take over what txt2img has ----

function dpoField(id, selector, parse) {
    const field = dpoElement(id);
    const input = field && field.querySelector(selector);
    const value = input && parse(input.value);
    return value === undefined || value === null || value === "" || Number.isNaN(value) ? null : value;
}

// Gets the page's own values in this order, and gives those that txt2img has in their place.
function dpoFromTxt2img(values) {
    const line = (text) => text.split("\n").map((part) => part.trim()).filter(Boolean).join(" ");
    const number = 'input[type="number"]';
    const found = [
        dpoField("txt2img_prompt", "textarea", line),
        dpoField("txt2img_neg_prompt", "textarea", line),
        dpoField("txt2img_seed", "input", (text) => text.trim()),
        dpoField("txt2img_steps", number, Number),
        dpoField("txt2img_cfg_scale", number, Number),
        dpoField("txt2img_sampling", "input", (text) => text.trim()),
        dpoField("txt2img_width", number, Number),
        dpoField("txt2img_height", number, Number),
    ];
    return values.map((own, i) => found[i] === null || found[i] === undefined ? own : found[i]);
}

// ---- start ----

// What a pointer that rests on a button is told.
const dpoTitles = {
    dpo_references_ask: "Say size, licence and folder of the chosen reference; nothing is fetched",
    dpo_references_cancel: "Stop the fetch; what came is kept, and the next one goes on from there",
    dpo_extract_find: "Look into the checkpoints here for the one that the reference was tuned from",
    dpo_extract_analyse: "Say whether the two files belong together and what a LoRA of each size keeps; nothing is written",
    dpo_extract_go: "Write a LoRA of the size chosen above into the LoRA folder",
    dpo_extract_dense: "Write the whole change in float32, as large as a UNet, into the reference folder",
    dpo_extract_interrupt: "Stop what the tab is doing; nothing half written stays",
    dpo_extract_preset_published: "Rank 128, like the LoRAs that others have published",
    dpo_extract_preset_small: "At most 80 MB, divided among the layers by what they count for",
    dpo_extract_preset_most: "As much of the change as a LoRA can hold",
    dpo_extract_preset_exact: "The whole change, a byte for each weight",
};

function dpoName() {
    for (const [id, title] of Object.entries(dpoTitles)) {
        const button = dpoElement(id);
        if (button) button.title = title;
    }
    dpoNameInputs();
    for (const button of dpoElement("dpo_tab").querySelectorAll("button.dpo-tool")) {
        button.title = "Look for new files";
        button.setAttribute("aria-label", button.title);
    }
}

// The numbers and ranges of sliders have no names in older gradio; their block says it.
function dpoNameInputs() {
    for (const input of dpoElement("dpo_tab").querySelectorAll('input[type="number"], input[type="range"]')) {
        const words = input.closest(".block") && input.closest(".block").querySelector('[data-testid="block-info"], label span');
        if (words && !input.getAttribute("aria-label")) input.setAttribute("aria-label", words.innerText.trim());
    }
}

// Gradio's pictures are buttons without a name.
function dpoNamePictures() {
    for (const picture of dpoElement("dpo_tab").querySelectorAll("button img")) {
        const button = picture.closest("button");
        if (!button.getAttribute("aria-label")) button.setAttribute("aria-label", picture.alt || "Open the picture");
    }
}

// Without txt2img, in the app, there is nothing to take over.
function dpoHideTake() {
    for (const id of ["dpo_compare_take", "dpo_blind_take"]) {
        const take = dpoElement(id);
        if (take && !dpoElement("txt2img_prompt")) take.style.display = "none";
    }
}

(function dpoBegin(tries) {
    if (!dpoWatch() && tries > 0) setTimeout(dpoBegin, 500, tries - 1); // the page is built after its scripts are read
})(600);
