/**
 * A chat room: whoever has the page open sees each message at once. {@linkcode startChat} is the server: `Deno.serve`
 * returns the page or upgrades the request to a WebSocket; the {@linkcode Room} keeps the clients in a `Set` and
 * broadcasts each message to them. A message is in the database before anyone sees it, and each client has a place in
 * the {@linkcode Log}, after which it is sent everything in one order.
 * @module
 */

import page from "./index.html" with { type: "text" };

// ─────────────────────────────────────────────────── The server ───────────────────────────────────────────────────
/** A running chat. `await using` shuts it down at the end of the block. */
export interface Chat extends AsyncDisposable {
  /** The address it listens on; of another kind if the platform sets `DENO_SERVE_ADDRESS` to one. */
  readonly addr: Deno.NetAddr;
  /** Writes what is pending, closes every socket with 1001 and ends, within 2 s even if the database hangs. */
  shutdown(): Promise<void>;
}

/**
 * Starts a chat server. It serves the page at `/` and its health at `/healthz`, and upgrades WebSockets on any path.
 * Throws a `RangeError` for an invalid option, `Deno.errors.AddrInUse` if the port is taken, an `Error` for a log that
 * cannot be read, and whatever reading the certificate and `Deno.openKv` throw.
 *
 * ```ts
 * import { startChat } from "./main.ts";
 * await using chat = await startChat({ port: 0, db: ":memory:" });
 * ```
 */
export async function startChat(options: ChatOptions = {}): Promise<Chat> {
  const settings = resolveSettings(options), { port, hostname, db, tlsCert, tlsKey } = settings;
  const [cert, key] = await Promise.all([tlsCert, tlsKey].map((path) => path && Deno.readTextFile(path)));
  const servePage = pageServer(settings.title), httpBuckets = new Map<string, Bucket>(), held = new Set<Request>();
  let room: Room | undefined, listener: ReturnType<typeof listen> | undefined, ended: Promise<void> | undefined;
  const opening = (async () => { // until the log is read, only the page is served
    room = new Room(typeof db === "object" ? db : await Deno.openKv(db), settings);
    await (ended ? room.close() : room.open()); // it may have taken too long
  })();
  const handler = async (request: Request, { remoteAddr }: Deno.ServeHandlerInfo) => {
    const forwarded = settings.trustProxy && request.headers.get("x-forwarded-for")?.replace(/^.*,/s, "").trim();
    const address = forwarded || ("hostname" in remoteAddr ? remoteAddr.hostname : undefined); // none on a Unix socket
    const isRushed = settings.rateLimit > 0 && address && spendFor(address, httpBuckets, REQUESTS) > 0;
    if (isRushed && held.size < MAX_HELD) (held.add(request), await wait(LATE), held.delete(request));
    if (isRushed) return respond(429, "Too many requests", { "retry-after": "1" });
    const [, pathname] = AUTHORITY_AND_PATH.exec(request.url) ?? [];
    if (!pathname) return respond(400, "Bad request");
    const isSocket = /^websocket$/i.test(request.headers.get("upgrade") ?? "");
    const trouble = room ? room.store.trouble : OPENING, isOpen = room && trouble !== OPENING;
    if (isSocket) return isOpen ? upgrade(request, address, room!) : respond(503, OPENING, { "retry-after": "1" });
    if (pathname !== "/" && pathname !== "/healthz") return respond(404, "Not found");
    if (!/^(GET|HEAD)$/.test(request.method)) return respond(405, "Method not allowed", { allow: "GET, HEAD" });
    if (pathname === "/") return await servePage(request);
    return trouble ? respond(503, trouble) : respond(200, room?.isFull(address) ? "full" : "ok");
  };
  const end = () => withTimeout(GRACE, listener?.end());
  const shutdown = () => ended ??= Promise.resolve(room?.close()).catch(report).then(end);
  try {
    listener = listen({ port, hostname, ...tlsCert && { cert, key } }, handler);
    await opening;
    return { addr: listener.addr, shutdown, [Symbol.asyncDispose]: shutdown };
  } catch (error) {
    await withTimeout(GRACE, opening.catch(() => {}));
    await shutdown();
    throw error;
  }
}

const OPENING = "The room is opening";
const REQUESTS = 100, GUESSES = 1, LATE = 1000, MAX_HELD = 1000; // HTTP requests, and wrong passwords, a second and address; ms until more are refused; requests that wait for that, since each takes 20 KB
const AUTHORITY_AND_PATH = /^[a-z+]+:\/\/[\w.:%[\]-]{0,300}(\/[^?#]*)/; // the platform's parser may take long for a host
const respond = (status: number, body: string, headers?: HeadersInit) => new Response(`${body}\n`, { status, headers });
function upgrade(request: Request, address: string | undefined, room: Room): Response {
  if (!isAllowed(request, room.settings)) return respond(403, "This page may not connect");
  if (room.isFull(address)) return respond(503, "The room is full", { "retry-after": "30" });
  try {
    const { socket, response } = Deno.upgradeWebSocket(request, { idleTimeout: room.settings.idleTimeout });
    room.add(socket, address);
    return response;
  } catch {
    return respond(400, "This is not a WebSocket handshake");
  }
}

/** Reports whether the origin may connect: the server's own, an allowed one, or none, which is not a browser. */
function isAllowed({ headers }: Request, { allowedOrigins, tlsCert, trustProxy }: Settings): boolean {
  const origin = headers.get("origin"), host = headers.get("host")?.toLowerCase(); // with the default port, perhaps
  if (origin === null || allowedOrigins.includes(origin)) return true;
  const isSecure = tlsCert || trustProxy && headers.get("x-forwarded-proto") === "https";
  const schemes = [["https://", ":443"], ["http://", ":80"]].slice(0, isSecure ? 1 : 2);
  return schemes.some(([scheme, port]) => [origin, origin + port].includes(scheme + host));
}

/** Returns a handler that serves the page, which may run its own script and style and talk to its own server only. */
function pageServer(title: string): (request: Request) => Promise<Response> {
  const name = title.replace(/[&<>]/g, (char) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[char]!);
  const html = page.replaceAll(">Chat<", () => `>${name}<`);
  const contentOf = (tag: string) => html.match(new RegExp(`<${tag}[^>]*>([^]*?)</${tag}>`))?.[1] ?? "";
  const hash = async (tag: string) => `${tag}-src 'sha256-${(await sha256(contentOf(tag))).toBase64()}'; `;
  const make = async (coding?: "br" | "gzip") => {
    const [zlib, { promisify }] = await Promise.all([import("node:zlib"), import("node:util")]);
    const compress = coding && promisify<string, Uint8Array>(zlib[coding === "br" ? "brotliCompress" : coding]);
    const body = new Uint8Array(await compress?.(html) ?? ENCODER.encode(html)); // `CompressionStream` takes a tenth more
    const headers = new Headers({
      "content-type": "text/html; charset=utf-8",
      "content-length": `${body.length}`,
      "cache-control": "no-cache",
      "content-security-policy": "default-src 'none'; " + await hash("script") + await hash("style") +
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " +
        "require-trusted-types-for 'script'; trusted-types 'none'",
      "cross-origin-opener-policy": "same-origin",
      "cross-origin-resource-policy": "same-origin",
      "permissions-policy": "camera=(), geolocation=(), microphone=()",
      "referrer-policy": "no-referrer",
      "vary": "accept-encoding",
      "x-content-type-options": "nosniff",
    });
    if (coding) headers.set("content-encoding", coding);
    return (method: string) => new Response(method === "HEAD" ? null : body, { headers });
  };
  const made: Partial<Record<string, ReturnType<typeof make>>> = {};
  return async (request) => {
    const accepted = request.headers.get("accept-encoding") ?? "";
    const coding = (["br", "gzip"] as const).find((coding) => new RegExp(`\\b${coding}\\b(?!\\s*;)`).test(accepted));
    return (await (made[`${coding}`] ??= make(coding)))(request.method);
  };
}

const AGAIN = 1000; // ms before listening again
/** Listens, and again at the same address after accepting failed (out of file descriptors, say), until `end` is called. */
function listen(options: Deno.ServeTcpOptions, handler: Deno.ServeHandler) {
  const onError = (error: unknown) => (report(error), respond(500, "Internal error"));
  let ending = new AbortController();
  const serve = () => Deno.serve({ ...options, signal: ending.signal, onError, onListen() {} }, handler);
  const { addr, finished } = serve();
  const ended = (async () => {
    for (let listening = finished;;) {
      await listening.catch(({ message }) => (stderr.print(`Connections cannot be accepted: ${message}`), wait(AGAIN)));
      if (ending.signal.aborted) return;
      [ending, options] = [new AbortController(), { ...options, ...addr as { port: number } }]; // a signal keeps what once waited for it
      listening = Promise.try(serve).then(({ finished }) => finished);
    }
  })();
  return { addr, end: () => (ending.abort(), ended) };
}

// ──────────────────────────────────────────────────── The room ────────────────────────────────────────────────────
const MAX_COPIES = 128 * 1024, MAX_FRAMES = 8000; // bytes sent before a turn of the event loop; frames of one message between two commits
const TICK = 50, EXCHANGE_EVERY = 20, REMOTE_EVERY = 200; // ms between looks; looks until presence is exchanged; until a remote database is read, which is billed
const DEADLINE = 10_000, GRACE = 380; // ms to complete a handshake, and to give the password; ms that a shutdown waits for each of the log, the clients, the database, the listener, and the terminal; also that a password may be late
/** Everyone who is connected, and what they are sent. */
class Room {
  readonly id = crypto.randomUUID(); // of this instance, in the database
  readonly #clients = new Set<Client>();
  readonly #neighbours = new Map<string, Set<Client>>(); // those of each address
  readonly log: Log;
  readonly store: Store;
  readonly presence: Presence;
  readonly #requests = new Requests(this);
  readonly #debts = new Map<string, Bucket>(); // for messages, of addresses whose clients left
  readonly #emptied = Promise.withResolvers<void>(); // when the last client has gone, at the end
  #ticking?: ReturnType<typeof setInterval>;
  #copied = 0; // bytes sent since it last yielded
  mostAtOnce = Infinity; // messages that may be written together, so that who gets a frame for each has them before the next
  #catchingUp?: Promise<void>;
  hasNews = false; // there is something to announce
  #announcing?: Promise<void>;
  #looking?: Promise<void>;
  #looks = 0;
  #lookAgain = performance.now(); // when the next look is due, in ms since the process began
  #watching?: Promise<void>;
  isClosed = false;
  constructor(readonly kv: Deno.Kv, readonly settings: Settings) {
    this.log = new Log(settings.history);
    this.store = new Store(kv, this.log, this);
    this.presence = new Presence(kv, this.id);
  }

  /** Reads the log, and keeps up with it from then on. Throws what the database throws. */
  async open(): Promise<void> {
    await this.store.open();
    if (!this.isClosed) this.#ticking = setInterval(() => this.#tick(), TICK);
  }

  isFull(address: string | undefined): boolean {
    const { maxClients, maxClientsPerAddress: most } = this.settings, neighbours = this.#neighbours.get(address ?? "");
    return this.#clients.size >= maxClients || most > 0 && !!address && (neighbours?.size ?? 0) >= most;
  }

  #count(client: Client, isHere: boolean): void {
    const { address = "" } = client, neighbours = this.#neighbours.get(address) ?? new Set();
    for (const clients of [this.#clients, neighbours]) clients[isHere ? "add" : "delete"](client);
    if (neighbours.size > 0) this.#neighbours.set(address, neighbours);
    else this.#neighbours.delete(address);
  }

  /** Adds a socket. Once it is open it gets every message, unless the room has a password. */
  add(socket: WebSocket, address: string | undefined): void {
    const client = new Client(this, socket, address), deadline = Math.min(DEADLINE, 1000 * this.settings.idleTimeout);
    const debt = this.#debts.get(address ?? ""); // who comes back does not begin anew
    if (debt) client.buckets.send_message = new Bucket(debt.rate, debt.fullAt);
    this.#count(client, true); // from the handshake on
    client.timer = setTimeout(() => this.#count(client, false), deadline); // a handshake that died has no event
    socket.onopen = () => {
      clearTimeout(client.timer);
      this.#count(client, true); // again, if it took long
      if (this.isClosed) return client.close(1001, "the server is going away");
      if (!this.settings.password) client.place = this.log.head;
      const end = () => client.place < Infinity || client.close(1008, "no password in time");
      client.timer = setTimeout(() => client.timer = setTimeout(end, GRACE), deadline); // after a stall, what came is read first
    };
    socket.onmessage = ({ data }) => this.#requests.receive(client, data);
    socket.onclose = async () => {
      await client.done; // what it sent before
      client.close(1000, "");
      this.#count(client, false); // until then it counts: a peer that does not answer is not gone
      const { send_message: debt } = client.buckets, { fullAt = 0 } = this.#debts.get(address ?? "") ?? {};
      if (address && debt && debt.fullAt > fullAt) put(this.#debts, [[address, debt]], isRefilled);
      if (this.isClosed && this.#clients.size === 0) this.#emptied.resolve();
    };
  }

  /** Calls `send` for every client. `send` returns how many bytes it sent; this returns the sum. */
  async #broadcast(send: (client: Client) => number): Promise<number> {
    let total = 0;
    for (const client of this.#clients) {
      const sent = send(client);
      total += sent;
      if ((this.#copied += sent) < MAX_COPIES) continue;
      await turn(); // the copies are sent while they are in the processor's cache
      this.#copied = 0;
    }
    return total;
  }

  /** Feeds a client: at once, unless others were sent much in this turn of the event loop. */
  feed(client: Client): void {
    if (this.#copied < MAX_COPIES) this.#copied += client.feed();
    if (this.#copied >= MAX_COPIES) this.catchUp();
  }

  /** Feeds those who are behind, a share in each pass, as long as they take more. Nobody else waits for that. */
  catchUp(): void {
    const passes = async () => {
      while (await this.#broadcast((client) => client.feed()) > 0);
    };
    this.#catchingUp ??= passes().catch(report).finally(() => this.#catchingUp = undefined);
  }

  /** Gives readers what is new after `from`, and logs what was accepted here. Returns the newest message. */
  async written(accepted: Message[], from: number): Promise<number> {
    if (this.settings.log && accepted.length > 0) {
      const first = from + 1, [{ username, message }] = accepted;
      const one = `${first} from ${JSON.stringify(username)}, ${message.length} characters`;
      stdout.print(`Message received: ${accepted.length > 1 ? `${accepted.length} at once, from ${first} on` : one}`);
    }
    let plain = 0; // those who get a frame for each message; who joined and is behind, or asked for more, waits
    const isNext = ({ joined, place, wanted }: Client) =>
      joined ? place >= from && wanted.length < 1 : place < Infinity && ++plain * (this.log.head - from) <= MAX_FRAMES;
    await this.#broadcast((client) => isNext(client) ? client.feed() : 0).catch(report);
    this.mostAtOnce = Math.max(1, MAX_FRAMES / plain);
    this.catchUp();
    return this.log.head;
  }

  /** Periodic work. The steps do not wait for each other: the database may hang, and a broadcast may take long. */
  #tick(): void {
    this.catchUp();
    if (this.hasNews) this.#announcing ??= this.#announce().catch(report).finally(() => this.#announcing = undefined);
    this.#looking ??= withTimeout(HANGS, this.#look()).catch(() => {}).finally(() => this.#looking = undefined);
    if (performance.now() - this.#lookAgain > HANGS) this.store.sync(); // it asks for itself, and reports what is wrong
  }

  async #announce(): Promise<void> {
    this.hasNews = false;
    const [roster, changes] = this.presence.takeNews();
    await this.#broadcast((client) => {
      const frame = client.needsRoster ? roster : changes;
      if (!client.joined || !frame) return 0;
      client.needsRoster = client.isBackedUp() || !client.send(frame);
      this.hasNews ||= client.needsRoster; // it is told when it reads again
      return frame.length;
    });
  }

  /** Sees what other instances wrote, and lets them see who is here. */
  async #look(): Promise<void> {
    const { db } = this.settings, isRemote = db === undefined || typeof db === "string" && isUrl(db);
    const isExchange = this.#looks++ % (isRemote ? REMOTE_EVERY : EXCHANGE_EVERY) === 0;
    const watch = async () => {
      for await (const [{ versionstamp }] of this.kv.watch([HEAD])) await this.store.sync(versionstamp);
    };
    if (isRemote) this.#watching ??= watch().catch(() => wait(RETRY)).finally(() => this.#watching = undefined);
    if (isRemote && !isExchange) return;
    await this.store.sync((await this.kv.get(HEAD)).versionstamp);
    if (isExchange) await this.presence.exchange().then(() => this.hasNews = true);
    this.#lookAgain = performance.now() + (isRemote ? REMOTE_EVERY * TICK : 0);
  }

  /** Writes what is pending, closes every socket with 1001, and closes the database unless that hangs. */
  async close(): Promise<void> {
    this.isClosed = true;
    await withTimeout(GRACE, Promise.all(this.#clients.values().map((one) => one.done)).then(() => this.store.working));
    this.store.isClosed = true;
    for (const client of this.#clients) client.close(1001, "the server is going away");
    clearInterval(this.#ticking);
    if (this.#clients.size > 0) await withTimeout(GRACE, this.#emptied.promise);
    const leave = async () => {
      await this.#looking;
      await this.presence.exchange().catch(() => wait(RETRY).then(() => this.presence.exchange())).catch(() => {}); // else the others presume this one dead, later
      await this.store.working;
      if (this.kv !== this.settings.db) this.kv.close();
    };
    await withTimeout(GRACE, leave());
  }
}

// ──────────────────────────────────────────────────── A client ────────────────────────────────────────────────────
const MAX_UNSENT = 1024 * 1024, FRAME_COST = 1024; // bytes waiting for a client until it is fed no more; besides its text
const STALL = 30_000, BURST = 5000; // ms without progress until such a client is closed; capacity of a bucket, in ms of refill
/** A token bucket. Its only state is the time at which it is full again, in ms since the process began. */
class Bucket {
  constructor(readonly rate: number, public fullAt = 0) {} // tokens a second
  msUntil(price = 1): number {
    return Math.max(0, Math.ceil(Math.max(0, this.fullAt - performance.now()) + 1000 * price / this.rate - BURST));
  }

  /** Takes `price` tokens and returns 0, or returns the milliseconds until there are that many. */
  spend(price = 1): number {
    const wait = this.msUntil(price);
    if (wait === 0) this.fullAt = Math.max(this.fullAt, performance.now()) + 1000 * price / this.rate;
    return wait;
  }
}

const isRefilled = ({ fullAt }: Bucket) => fullAt < performance.now();
/** Puts entries last in a map, and deletes those that are over: they are among the first. */
function put<T>(map: Map<string, T>, entries: [string, T][], isOver: (value: T) => boolean): void {
  for (const [key, value] of entries) (map.delete(key), map.set(key, value));
  for (const [key, value] of map) {
    if (!isOver(value)) break;
    map.delete(key);
  }
}

/** Takes a token of an address and returns 0, or returns the milliseconds until there is one. */
function spendFor(address: string, buckets: Map<string, Bucket>, rate: number): number {
  const bucket = buckets.get(address) ?? new Bucket(rate), wait = bucket.spend();
  put(buckets, [[address, bucket]], isRefilled);
  return wait;
}

/** A connection: its socket, its place in the log, and what it may still ask for. */
class Client {
  /** The number of the last message sent, or START. Infinity while it may not read: without the password, or once closed. */
  place = Infinity;
  joined = false; // then a frame to it may hold several events, one a line
  username?: string; // that it joined with
  tag?: string; // derived from its key, shown with its messages
  readonly arrived = new Set<{ frame: string | ArrayBuffer }>(); // the first of these frames is being handled, the others wait
  done?: Promise<void>; // when all of them are handled
  readonly wanted: number[] = []; // before which messages it asked for history
  needsRoster = false; // it has to be told who is here, not only what changed
  isClosed = false; // nothing is read from it or sent to it any more
  due = 0; // of its last message in the queue
  readonly cameAt = performance.now(); // in ms since the process began
  timer?: ReturnType<typeof setTimeout>; // closes it later
  readonly buckets: Partial<Record<Limit, Bucket>> = {}; // what it may still ask for
  #unsent = 0; // bytes that wait to be sent, at most, and what their frames cost, about
  #sent = 0; // bytes that wait, or were sent with them, at most
  #frames = 0; // that they are in
  #waiting = Infinity; // how many bytes did when it was last found backed up
  #tookAt = 0; // when it last took some of them, in ms since the process began
  readonly fail = (error: unknown) => (report(error), this.close(1011, "internal error"));
  constructor(readonly room: Room, readonly socket: WebSocket, readonly address: string | undefined) {}

  /** Sends what it asked for and the messages after its place, as long as it reads. Returns about how many bytes it sent. */
  feed(): number {
    const { log } = this.room, isReady = () => sent < MAX_COPIES && !this.isBackedUp();
    let sent = 0;
    while (this.wanted.length > 0 && this.place < Infinity && isReady()) {
      const page = log.before(this.wanted.shift()!);
      sent += this.send(page) ? 3 * page.length : MAX_COPIES;
    }
    while (this.place < log.head && log.oldest <= log.head && isReady()) {
      const batch = log.after(this.place, !this.joined);
      if (!batch) this.close(1013, "what comes next is no longer kept");
      else if (this.send(batch.text, batch.bytes)) {
        [this.place, sent] = [Math.max(this.place, batch.last), sent + (this.joined ? batch.bytes : batch.text.length)];
      } else break;
    }
    if (this.place > log.head && this.place < Infinity) this.close(1013, "the room was replaced");
    return sent;
  }

  /** Sends a frame; false if that cannot be done. A character has at most 3 bytes. */
  send(frame: string, bytes = 3 * frame.length): boolean {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    try {
      this.socket.send(frame);
    } catch (error) {
      this.fail(error);
      return false;
    }
    this.#sent += bytes;
    this.#frames++;
    this.#unsent += bytes + FRAME_COST;
    if (this.isBackedUp() && this.#unsent > 2 * MAX_UNSENT) this.close(1013, "too slow"); // it asked for more than it reads
    return true;
  }

  /** Reports whether too much waits to be sent. Closes the client if that has not shrunk for STALL ms. */
  isBackedUp(): boolean {
    if (this.#unsent <= MAX_UNSENT) return false; // the socket is asked no more often: that costs
    const { bufferedAmount } = this.socket, kept = Math.min(1, 3 * bufferedAmount / this.#sent);
    this.#unsent = bufferedAmount * (1 + FRAME_COST * this.#frames / this.#sent);
    [this.#sent, this.#frames] = [kept * this.#sent, kept * this.#frames]; // what was taken says nothing about the rest
    const isFull = this.#unsent > MAX_UNSENT, now = performance.now();
    if (bufferedAmount < this.#waiting) this.#tookAt = now;
    this.#waiting = isFull ? bufferedAmount : Infinity;
    if (isFull && now - this.#tookAt > STALL) this.close(1013, "too slow");
    return isFull;
  }

  /** Ends the connection, after `delay` ms. The client counts as gone at once: its peer may never answer. */
  close(code: number, reason: string, delay = 0): void {
    clearTimeout(this.timer);
    if (delay > 0) this.timer = setTimeout(() => this.socket.close(code, reason), delay);
    else this.socket.close(code, reason);
    if (this.joined) this.room.presence.count(this.username, -1);
    this.room.hasNews ||= this.joined;
    [this.joined, this.isClosed, this.place] = [false, true, Infinity];
  }
}

// ───────────────────────────────────────────── What a client may ask for ─────────────────────────────────────────────
const RATES = { join: 2, history: 5, typing: 2, ping: 2, error: 20 }; // a second, besides messages and frames
const MAX_FRAME = 64 * 1024, PAGE = 200, SYNC = 1000; // bytes of a frame from a client, far over every limit; messages that a join, or a request for history, is answered with; ms that it waits if `since` is newer than this log
const SLICE = 2, MAX_WAITING = 1000; // ms of a turn after which a client gets no second frame in it; frames that wait from which it does: they must not come faster than they go; requests for history that may wait
type Limit = "frame" | Incoming["event"]; // a frame is paid for before it is parsed, its event before most of what it says is checked
/** Handles what clients ask for, rate-limited per client. */
class Requests {
  readonly #salt = crypto.randomUUID(); // so that the time of a comparison tells nothing about the password
  readonly #guesses = new Map<string, Bucket>(); // of addresses that gave a wrong password
  #begun = 0; // when clients last began a turn of the event loop
  #turn?: Promise<unknown>; // until they begin the next
  constructor(readonly room: Room) {}

  receive(client: Client, frame: string | ArrayBuffer): void {
    if (client.isClosed) return;
    const size = typeof frame === "string" ? frame.length : frame.byteLength;
    const isBig = size > MAX_FRAME || 3 * size > MAX_FRAME && isText(frame) && ENCODER.encode(frame).length > MAX_FRAME;
    if (isBig) return client.close(1009, `a frame may have ${MAX_FRAME} bytes`);
    if (!this.#pay(client, "frame", undefined, 1 + size / 1024)) return;
    if (client.arrived.add({ frame }).size === 1) client.done = this.#serve(client);
  }

  /** Handles the frames of a client: in a turn of the event loop as many as there is time for, or one. */
  async #serve(client: Client): Promise<void> {
    for (const item of client.arrived) {
      try {
        const incoming = !client.isClosed && check(item.frame, (event, id) => this.#pay(client, event, id));
        if (incoming) await this.#dispatch(client, incoming);
      } catch (error) {
        client.fail(error);
      }
      const isOver = performance.now() - this.#begun > SLICE && client.arrived.size < MAX_WAITING;
      if (isOver) await (this.#turn ??= turn().then(() => [this.#begun, this.#turn] = [performance.now(), undefined]));
      client.arrived.delete(item);
    }
  }

  #dispatch(client: Client, incoming: Incoming): void | Promise<void> {
    if (incoming.event === "error") return this.#refuse(client, incoming);
    const { event } = incoming, id = event === "send_message" ? incoming.id : undefined;
    if (event === "join" && client.place === Infinity) return this.#askPassword(client, incoming);
    if (event === "join") return this.#admit(client, incoming);
    if (client.place === Infinity) return this.#refuse(client, refusal("join with the password first", id));
    if (event === "send_message") return this.#accept(client, incoming);
    if (event === "ping") return void client.send('{"event":"pong"}');
    if (event === "history" && !client.joined) return this.#refuse(client, refusal("join before asking for history"));
    const isMuch = event === "history" && client.wanted.length >= MAX_WAITING;
    if (isMuch) return this.#refuse(client, refusal("too many history requests are waiting", undefined, 1000));
    if (event === "history") return void (client.wanted.push(incoming.before), this.room.feed(client));
    if (!client.username) return this.#refuse(client, refusal("join with a username before typing"));
    this.room.presence.typing.add(client.username);
    this.room.hasNews = true;
  }

  #pay(client: Client, limit: Limit, id?: string, price?: number): boolean {
    const wait = this.#spend(client, limit, price);
    const what = { send_message: "messages", frame: "frames" }[limit as string] ?? `${limit} requests`;
    if (wait > 0) this.#refuse(client, refusal(`too many ${what}`, id, wait));
    return wait === 0;
  }

  #spend(client: Client, limit: Limit, price?: number): number {
    const { rateLimit } = this.room.settings;
    const rate = limit === "send_message" ? rateLimit : limit === "frame" ? 50 + 5 * rateLimit : RATES[limit];
    return rateLimit && (client.buckets[limit] ??= new Bucket(rate)).spend(price);
  }

  #refuse(client: Client, refusal: Refusal): void {
    if (this.#spend(client, "error") > 0) client.close(1013, "too many errors");
    else client.send(JSON.stringify(refusal));
  }

  #accept(client: Client, message: Message): void {
    const { id = "", username } = message, { log, store } = this.room, seq = log.ids.get(id) ?? 0;
    if (typeof seq === "object") return void ([seq.sender, client.due] = [client, Math.max(client.due, seq.due)]); // who is told if there is no room
    if (seq > 0 && seq > client.place) return; // it comes in its turn
    if (seq >= log.oldest) return void client.send(log.line(seq)!); // an id may outlive its message
    if (client.tag) message.body = `${message.body.slice(0, -1)},"tag":"${client.tag}"}`;
    if (this.room.presence.typing.size > 0) this.room.presence.typing.delete(username);
    const excess = store.append(message, client), error = "the room cannot take more messages just now";
    if (excess) this.#refuse(excess.sender, refusal(error, excess.id, 1000));
  }

  async #admit(client: Client, { username, since, time, key }: Join): Promise<void> {
    const { log, presence, store } = this.room;
    if (key) client.tag = (await sha256(key)).toBase64({ alphabet: "base64url" }).slice(0, 12);
    if ((since ?? 0) > log.head && client.arrived.size < 2) await withTimeout(SYNC, store.sync()); // it was on another instance, and what it sends meanwhile waits
    if (client.isClosed) return;
    const { head, oldest } = log, isKnown = since !== undefined && log.knows(since, time);
    const resumed = isKnown && since >= oldest - 1;
    if (client.joined) presence.count(client.username, -1);
    presence.count(username, 1);
    client.place = resumed ? since : isKnown || head - PAGE < oldest ? START : head - PAGE;
    [client.username, client.joined, client.needsRoster] = [username, true, true];
    client.send(JSON.stringify({ event: "joined", seq: head, oldest, resumed, username, tag: client.tag }));
    this.room.feed(client);
    this.room.hasNews = true;
  }

  async #askPassword(client: Client, join: Join): Promise<void> {
    const { address = "" } = client, hash = async (text: string) => (await sha256(this.#salt + text)).toBase64();
    if (join.password === undefined) return client.close(1008, "this room has a password");
    const isRight = await hash(join.password) === await hash(this.room.settings.password);
    if (this.#guesses.get(address)?.msUntil()) return client.close(1013, "too many wrong passwords", LATE);
    if (isRight) return await this.#admit(client, join);
    client.close(1008, "wrong password", LATE);
    if (address) spendFor(address, this.#guesses, GUESSES);
  }
}

// ──────────────────────────────────────────────────── The log ────────────────────────────────────────────────────
const MAX_BATCH = 64 * 1024, START = -1; // UTF-16 units of lines in one frame; the place before the oldest message that is kept
/** Messages that are sent together: their lines, the lines joined, and an upper bound of the size of that in bytes. */
type Batch = { first: number; last: number; lines: string[]; text: string; bytes: number };
/** The messages that are kept, in memory: their lines as they go on the wire, oldest first, without a gap. */
class Log {
  head = 0; // the number of the newest message
  oldest = 1; // that of the oldest, or of the next if there is none
  readonly ids = new Map<string, number | Queued>(); // the message that an id names, by its number once it is written
  #lines: string[] = [];
  newest?: Batch; // what nearly every client is sent next
  constructor(readonly history: number) {}

  readonly line = (seq: number) => this.#lines[seq - this.oldest] ?? this.newest?.lines[seq - this.newest.first];

  after(seq: number, isAlone: boolean): Batch | undefined {
    const first = seq === START ? this.oldest : seq + 1, start = first - this.oldest, text = this.line(first);
    if (isAlone && text) return { first, last: first, lines: [text], text, bytes: 3 * text.length };
    if (this.newest?.first === first) return this.newest;
    if (start < 0) return undefined;
    let end = start, units = 0;
    do units += this.#lines[end++].length + 1; while (end < this.#lines.length && units < MAX_BATCH);
    const lines = this.#lines.slice(start, end);
    return { first, last: first + lines.length - 1, lines, text: lines.join("\n"), bytes: 3 * units };
  }

  before(seq: number): string {
    const end = Math.max(0, Math.min(seq, this.head + 1) - this.oldest);
    const lines = this.#lines.slice(Math.max(0, end - PAGE), end);
    let units = 0;
    const first = lines.findLastIndex((line) => (units += line.length) > MAX_BATCH) + 1;
    return `{"event":"history","before":${seq},"messages":[${lines.slice(first)}]}`;
  }

  /** Reports whether this log has message `seq` with this time, or may have deleted it. */
  knows(seq: number, time?: number): boolean {
    if (seq > this.head || seq === 0 || time === undefined) return seq <= this.head;
    const line = this.line(Math.max(seq, this.oldest)), known = line ? JSON.parse(line).time : Infinity;
    return seq < this.oldest ? time <= known : time === known;
  }

  add(batch: Batch, ids: (string | undefined)[]): void {
    [this.newest, this.head] = [batch, batch.last];
    this.#lines.push(...batch.lines);
    this.#lines.splice(0, this.#lines.length - this.history);
    this.oldest = this.head - this.#lines.length + 1;
    const named = ids.flatMap((id, i): [string, number][] => id ? [[id, batch.first + i]] : []);
    put<number | Queued>(this.ids, named, (seq) => seq as number < this.oldest); // at once: its first entry is found slowly
  }

  restart(head: number): void {
    [this.head, this.oldest, this.#lines, this.newest] = [head, head + 1, [], undefined];
    for (const [id, seq] of this.ids) if (typeof seq === "number") this.ids.delete(id);
  }
}

type Head = { layout: number; last: number; writers?: string[] }; // the newest message; which instances wrote last, and from which message on
const HEAD = ["chat", "head"]; // → a Head
const LOG = ["chat", "log"]; // [...LOG, first] → an entry: its lines, joined, in UTF-8
const ROSTERS = ["chat", "here"]; // [...ROSTERS, instance] → { online, users }
const LAYOUT = 1, MAX_VALUE = 64 * 1024; // version of these keys and values; bytes of one value, and so of one entry
const MAX_DELETES = 500, MAX_ENTRIES = 20_000, MAX_WRITERS = 16; // entries that one commit deletes; that are remembered where others delete too; instances in a head
const MAX_QUEUE = 8000, MESSAGE_COST = 1000, CROWD = 200, NEW = 1000; // messages that wait for the next commit; characters that each counts besides its own; messages in the queue that let no new client in; ms for which it is new
const RETRY = 50, REPORTED = 5; // ms before what failed is tried again; failures in a row before they are reported
const GATHER = 50, SHARE = 100, HANGS = 5000; // ms at most that arriving messages are waited for; ms at most that an instance leaves the database to the others after a commit; ms until the database is said not to respond
/**
 * The log in Deno KV: what is accepted is written there, and what other instances write is read from there.
 * What arrives during one commit is written by the next (a group commit). A commit succeeds only if the head still has
 * the versionstamp known here, on top of everything that any instance wrote: there is one order, and ids are exact.
 */
class Store {
  isClosed = false; // nothing more is started
  working?: Promise<void>; // pending while there is anything to read or to write
  readonly #buffer = new Uint8Array(MAX_VALUE);
  #writers: string[] = [];
  #version: string | null = ""; // the versionstamp of the head: null if there is none, and the empty string until it is read
  #entries: number[] = []; // the first messages of the entries that the database holds
  #queue: Queued[] = [];
  #due = 0; // that of the last message taken from the queue
  #uncertain?: string; // the entry of a commit that threw, and may have been written all the same
  #isBehind = true; // another instance has written, or may have
  #pulled = Promise.withResolvers<void>(); // once what that was has been read
  #workedAt = 0; // when it last did what it had to, in ms since the process began
  #failures = 0; // in a row: two processes on one file may lock each other out for a moment
  #failure?: string = OPENING; // why messages cannot be written
  constructor(readonly kv: Deno.Kv, readonly log: Log, readonly room: Room) {}

  /** Reads the log. Throws what the database throws, and an `Error` for an entry that cannot be read. */
  async open(): Promise<void> {
    while (this.#isBehind) await this.#pull();
    this.#failure = undefined;
  }

  get trouble(): string | undefined {
    if (this.isClosed || this.#failure) return this.#failure ?? "The server is going away";
    return this.working && performance.now() - this.#workedAt > HANGS ? "The database is not responding" : undefined;
  }

  /** Queues a message, before what others say who have more in the queue. Returns the last one if there are too many. */
  append(message: Message, sender: Client): Queued | undefined {
    const isNew = this.room.settings.rateLimit > 0 && performance.now() - sender.cameAt < NEW;
    if (isNew && this.#queue.length > CROWD) return { ...message, sender, due: 0 }; // else who comes anew each time goes first
    const cost = MESSAGE_COST + message.body.length, next = isNew ? Math.max(sender.due, this.#due) : sender.due;
    const due = sender.due = Math.max(next + cost, this.#due), queued = { ...message, sender, due }; // who was silent is ahead
    this.#queue.splice(this.#queue.findLastIndex((other) => other.due <= due) + 1, 0, queued);
    if (message.id) this.log.ids.set(message.id, queued);
    this.working ??= this.#loop();
    const excess = this.#queue.length > MAX_QUEUE ? this.#queue.pop() : undefined;
    if (excess?.id) this.log.ids.delete(excess.id);
    return excess;
  }

  /** Brings the log up to date with the database: at once, or if its head is not at this version, soon. */
  sync(version?: string | null): Promise<void> | undefined {
    if (version === this.#version) return;
    this.#isBehind = true;
    const { promise } = this.#pulled;
    this.working ??= this.#loop();
    if (version === undefined) return promise;
  }

  async #loop(): Promise<void> {
    this.#workedAt = performance.now();
    while (!this.isClosed && (this.#isBehind || this.#queue.length > 0)) {
      const { resolve } = this.#pulled;
      this.#pulled = Promise.withResolvers();
      try {
        if (this.#isBehind) await this.#pull(); // then a commit in any case: reading may never end
        resolve();
        if (this.#queue.length > 0 && !await this.#commit()) continue;
        this.#workedAt = performance.now();
        if (this.#failures >= REPORTED) stderr.print("The database works again");
        [this.#failures, this.#failure] = [0, undefined];
      } catch (error) {
        this.#isBehind = true; // nothing is dropped: it stays in the queue, unconfirmed
        if (++this.#failures >= REPORTED) this.#failure = `Database error: ${(error as Error)?.message}`;
        if (this.#failures === REPORTED) stderr.print(this.#failure!);
        await wait(RETRY);
      }
    }
    this.working = undefined; // in the same turn as the last look at the queue
  }

  async #commit(): Promise<boolean> {
    for (let late = performance.now() + GATHER, before = -1; performance.now() < late && this.#queue.length > before;) {
      before = this.#queue.length; // until a turn brings nothing more, so that what arrives now is written together
      await turn();
    }
    const text = this.#uncertain ?? this.#nextEntry(Date.now()), lines = text.split("\n");
    const first = this.log.head + 1, last = this.log.head + lines.length, expired = this.#expired(last);
    const { written: bytes } = ENCODER.encodeInto(text, this.#buffer);
    const others = this.#writers.filter((writer) => !writer.startsWith(this.room.id)).slice(-MAX_WRITERS);
    const commit = this.kv.atomic().check({ key: HEAD, versionstamp: this.#version });
    const head: Head = { layout: LAYOUT, last, writers: [...others, `${this.room.id} ${first}`] };
    commit.set(HEAD, head).set([...LOG, first], this.#buffer.subarray(0, bytes));
    for (const entry of expired) commit.delete([...LOG, entry]);
    this.#due = this.#queue[lines.length - 1].due;
    this.#uncertain = text; // if this throws, the same entry is tried again until the outcome is known
    const begun = performance.now(), result = await commit.commit(), took = performance.now() - begun;
    this.#isBehind ||= !result.ok;
    if (!result.ok) return false;
    [this.#version, this.#writers, this.#uncertain] = [result.versionstamp, head.writers!, undefined];
    this.#entries.splice(0, expired.length);
    this.#entries.push(first);
    const accepted = this.#queue.splice(0, lines.length);
    this.log.add({ first, last, lines, text, bytes }, accepted.map(({ id }) => id));
    await this.room.written(accepted, first - 1);
    if (this.room.presence.others.size > 0 && !this.room.isClosed) await wait(Math.min(SHARE, 3 * took)); // else one of them might hardly ever get to write
    return true;
  }

  #nextEntry(time: number): string {
    const lines: string[] = [];
    let seq = this.log.head, units = 0;
    for (const { body } of this.#queue.slice(0, this.room.mostAtOnce)) {
      const line = `{"event":"receive_message","seq":${++seq},"time":${time},${body}`;
      if ((units += line.length + 1) > MAX_VALUE) break;
      lines.push(line);
    }
    const text = lines.join("\n"), { read } = ENCODER.encodeInto(text, this.#buffer);
    return read < text.length ? text.slice(0, text.lastIndexOf("\n", read)) : text;
  }

  async #pull(): Promise<void> {
    this.#isBehind = false; // what is written from here on may be missed
    const { value, versionstamp } = await this.kv.get<Head>(HEAD);
    const { layout, last, writers = [] } = value ?? { layout: LAYOUT, last: 0 };
    if (layout !== LAYOUT || !isWhole(last)) throw new Error(`the database has layout ${layout}, not ${LAYOUT}`);
    if (versionstamp === this.#version) return;
    const isWritten = this.#uncertain && writers.includes(`${this.room.id} ${this.log.head + 1}`); // though the commit threw
    const accepted = isWritten ? this.#queue.splice(0, this.#uncertain!.split("\n").length) : [];
    this.#uncertain = undefined; // else it never will be
    for (const { id = "" } of accepted) this.log.ids.delete(id);
    await this.room.written(accepted, this.log.head);
    if (last < this.log.head) { // the room was emptied
      [this.#entries, this.#version] = [[], ""]; // what was known of the head says nothing about this log
      this.log.restart(0);
      await this.room.written([], 0);
    }
    await this.#read();
    if (this.log.head < last) { // what is missing was deleted: meanwhile, because so much was written, or by hand
      this.#isBehind ||= (await this.kv.get(HEAD)).versionstamp !== versionstamp;
      if (this.#isBehind) return;
      this.log.restart(last);
    }
    [this.#version, this.#writers] = [versionstamp, writers];
  }

  async #read(): Promise<void> {
    let told = this.log.head; // the last message that readers were given: small entries are given together
    for await (const entry of this.kv.list<Uint8Array>({ prefix: LOG, start: [...LOG, this.log.head + 1] })) {
      const { first, text, lines, ids } = decode(entry, this.log.head), last = first + lines.length - 1;
      if (last - told > this.log.history / 50) told = await this.room.written([], told);
      if (first > this.log.head + 1) this.log.restart(first - 1); // what was before it is deleted
      if (this.#version) this.#entries.splice(0, this.#entries.length - Math.max(MAX_ENTRIES, 2 * this.log.history)); // others have deleted them
      this.#entries.push(first);
      this.log.add({ first, last, lines, text, bytes: 3 * text.length }, ids);
      this.#queue = this.#queue.filter((queued) => !queued.id || this.log.ids.get(queued.id) === queued);
    }
    await this.room.written([], told);
  }

  /** The entries that can be deleted once `head` is the newest message; the last entry is always kept. */
  #expired(head: number): number[] {
    const kept = this.#entries.findIndex((_, i) => (this.#entries[i + 1] ?? Infinity) > head - this.log.history + 1);
    return this.#entries.slice(0, Math.min(Math.max(kept, 0), MAX_DELETES));
  }
}

/** What an entry after message `head` holds. Throws an `Error` if it cannot be read. */
function decode({ key, value }: Deno.KvEntry<Uint8Array>, head: number) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(value), lines = text.split("\n");
    const messages: { seq: number; id?: string }[] = lines.map((line) => JSON.parse(line)), first = Number(key.at(-1));
    if (first <= head || !messages.every(({ seq }, i) => seq === first + i)) throw new Error("not in order");
    return { first, text, lines, ids: messages.map(({ id }) => id) };
  } catch {
    throw new Error(`the entry ${JSON.stringify(key)} cannot be read: restore a backup, or delete that entry`);
  }
}

// ─────────────────────────────────────────────────── Who is here ───────────────────────────────────────────────────
const HEARTBEAT = 10_000, PRESUMED_DEAD = 30_000, TRIVIAL = 1024, MAX_TYPING = 10; // ms between roster writes; ms without one until an instance counts as gone; length of changes that are told even if the roster is shorter; names told at once
/** Who is on another instance, and when its entry was last seen to change, in ms since this process began. */
type Roster = { online: number; users: string[]; version: string; at: number };
/** Who is here, on this instance and on the others, and who is typing on this one. */
class Presence {
  readonly typing = new Set<string>(); // since that was last told
  #online = 0; // connections that joined, on this instance
  readonly #users = new Map<string, number>(); // how many of them each name has
  others = new Map<string, Roster>(); // the other instances
  #told = { online: 0, users: new Set<string>() }; // what the room was told last
  #changes = 0; // how often someone joined or left
  #published = 0; // `#changes` when the roster was last written
  #writtenAt = -Infinity;
  constructor(readonly kv: Deno.Kv, readonly id: string) {}

  /** A connection joined, or left if `by` is -1. */
  count(username: string | undefined, by: 1 | -1): void {
    this.#online += by;
    this.#changes++;
    if (username === undefined) return;
    const connections = (this.#users.get(username) ?? 0) + by;
    if (connections > 0) this.#users.set(username, connections);
    else this.#users.delete(username);
  }

  /** The frame for new clients and the frame for the rest, empty if nothing changed. Resets the changes. */
  takeNews(): [roster: string, changes: string] {
    const told = this.#told, others = [...this.others.values()];
    const users = new Set([...this.#users.keys(), ...others.flatMap(({ users }) => users)]);
    const online = others.reduce((sum, { online }) => sum + online, this.#online);
    this.#told = { online, users };
    const joined = [...users.difference(told.users)], left = [...told.users.difference(users)];
    const roster = JSON.stringify({ event: "presence", online, users: fitting(users) });
    const changes = JSON.stringify({ event: "presence", online, joined, left });
    const line = (username: string) => JSON.stringify({ event: "typing", username });
    const typing = [...this.typing].slice(0, MAX_TYPING).map(line);
    this.typing.clear();
    const isNew = joined.length > 0 || left.length > 0 || online !== told.online;
    const news = isNew ? [changes.length > Math.max(roster.length, TRIVIAL) ? roster : changes] : [];
    return [[roster, ...typing].join("\n"), [...news, ...typing].join("\n")];
  }

  /** Reads who is on the other instances, and lets them read who is on this one. Throws what the database throws. */
  async exchange(): Promise<void> {
    const now = performance.now(), others = new Map<string, Roster>(), own = [...ROSTERS, this.id];
    for await (const { key, value, versionstamp: version } of this.kv.list<Roster>({ prefix: ROSTERS })) {
      if (!isWhole(value?.online) || !Array.isArray(value.users) || !value.users.every(isText)) continue;
      const id = String(key.at(-1)), known = this.others.get(id), at = known?.version === version ? known.at : now;
      if (now - at > PRESUMED_DEAD) await this.kv.atomic().check({ key, versionstamp: version }).delete(key).commit();
      else if (id !== this.id) others.set(id, { ...value, version, at });
    }
    this.others = others;
    const changes = this.#changes, isStale = changes > this.#published;
    if (!isStale && (this.#online === 0 || now - this.#writtenAt < HEARTBEAT)) return;
    if (this.#online === 0) await this.kv.delete(own);
    else await this.kv.set(own, { online: this.#online, users: fitting(this.#users.keys()) });
    [this.#published, this.#writtenAt] = [changes, now];
  }
}

/** As many of the names as fit into one value and one frame, at no more than 3 bytes per UTF-16 unit. */
function fitting(names: Iterable<string>): string[] {
  let bytes = 1024; // for the rest
  return Iterator.from(names).filter((name) => (bytes += 3 * name.length + 3) < MAX_VALUE).toArray();
}

// ──────────────────────────────────────────── Checking what a client sends ────────────────────────────────────────────
const MAX_USERNAME = 40, MAX_MESSAGE = 2000, MAX_UNCLEAN = 120; // UTF-16 units, as maxlength counts; of a name, uncleaned
/** A message that can be accepted. `body` is the end of its line on the wire; the start is known once it is written. */
type Message = { event: "send_message"; username: string; message: string; id?: string; body: string };
type Queued = Message & { sender: Client; due: number }; // what its sender has said with it, in characters: the order of the queue
type Join = { event: "join"; username?: string; since?: number; time?: number; key?: string; password?: string };
type Refusal = { event: "error"; error: string; id?: string; retry_after?: number }; // in milliseconds
type Pay = (event: Incoming["event"], id?: string) => boolean; // called once the event is known; false if it is refused
type Incoming = Message | Join | { event: "history"; before: number } | { event: "typing" | "ping" } | Refusal;
function check(frame: string | ArrayBuffer, pay: Pay): Incoming | false {
  if (typeof frame !== "string") return refusal("a frame must be text, not binary");
  const [, body, username, message, id] = USUAL.exec(frame) ?? [];
  if (body) return pay("send_message", id) && { event: "send_message", username, message, id, body };
  let data: Record<string, unknown>;
  try {
    data = FEW_VALUES.test(frame) && JSON.parse(frame);
  } catch {
    return refusal('a frame must be JSON, like {"event":"send_message","username":"Ada","message":"Hi"}');
  }
  if (Object(data) !== data || Array.isArray(data)) return refusal("a frame must be a JSON object, with few values");
  const { event = "message" in data ? "send_message" : undefined, before } = data;
  if (event === "send_message") return checkMessage(data, pay);
  if (event === "join") return pay(event) && checkJoin(data);
  if (event === "typing" || event === "ping") return pay(event) && { event };
  if (event !== "history") return refusal("event must be send_message, join, history, typing or ping");
  if (!pay(event)) return false;
  return isWhole(before) ? { event, before } : refusal("before must be a whole number, the oldest seq seen");
}

function checkMessage({ username, message, id }: Record<string, unknown>, pay: Pay): Incoming | false {
  if (id !== undefined && !isToken(id, /^[\w-]{1,64}$/)) return refusal("id must be 1 to 64 of A-Z a-z 0-9 _ -");
  if (!pay("send_message", id)) return false;
  const text = typeof message === "string" ? message.trim() : "";
  if (!text || text.length > MAX_MESSAGE) return refusal(`message must be 1 to ${MAX_MESSAGE} characters`, id);
  const name = cleanName(username);
  if (!name) return refusal(`username must be 1 to ${MAX_USERNAME} characters`, id);
  const kept = { username: name, message: text.toWellFormed().replaceAll("\0", "\ufffd"), id };
  return { event: "send_message", ...kept, body: JSON.stringify(kept).slice(1) };
}

function checkJoin({ username, since, time, key, password }: Record<string, unknown>): Incoming {
  const name = cleanName(username);
  if (username !== undefined && !name) return refusal(`username must be 1 to ${MAX_USERNAME} characters`);
  if (since !== undefined && !isWhole(since)) return refusal("since must be a whole number, the last seq seen");
  if (time !== undefined && !isWhole(time)) return refusal("time must be a whole number, the time of that message");
  if (key !== undefined && !isToken(key, /^[\w-]{16,128}$/)) return refusal("key must be 16 to 128 of A-Z a-z 0-9 _ -");
  if (password !== undefined && typeof password !== "string") return refusal("password must be a string");
  return { event: "join", username: name, since, time, key, password };
}

const INVISIBLE = /[[\p{C}\p{DI}\u2800\ufffc\u{13441}\u{13442}\u{16fe4}\u{1d159}]--[\t-\r]]/gv; // DI: default ignorable
const DOT = /(?<=[\p{SD}\u0131\u0237\u025f]\p{M}*)\u0307/gu; // on an i, which has one
const LOOSE = /[\u0321\u0322\u0334-\u0338\u0654-\u065f\u0670]/g; // hooks, strokes and hamzas that are no part of a letter, but look like it
const TOO_MANY = /(?<=\p{M})(\p{M})(?<=\1\p{M}{1,8}|\p{M}{9})/gu; // marks on one letter: they cover other lines, or each other
const FEW_VALUES = /^[^"]{0,64}(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"]{0,64}){0,24}$/s; // JSON that costs little to parse
/** A message in ASCII with nothing to clean or escape, no longer than MAX_USERNAME and MAX_MESSAGE: its body is a part of it. */
const USUAL =
  /^{"event":"send_message",("username":"(?=[^"]{1,40}")([!#-[\]-~]+(?: [!#-[\]-~]+)*)","message":"([!#-[\]-~](?:[ !#-[\]-~]{0,1998}[!#-[\]-~])?)"(?:,"id":"([\w-]{1,64})")?})$/;
/** A name as it is shown: nothing in it can hide, cover or reorder a line, or add one. Undefined if it is invalid. */
function cleanName(name: unknown): string | undefined {
  if (typeof name !== "string" || name.length > MAX_UNCLEAN) return undefined;
  const shown = name.toWellFormed().replace(INVISIBLE, "").replace(/(?<=^|\s)\p{M}+/gu, "").replace(/\s+/g, " ").trim();
  const composed = shown.normalize().replace(LOOSE, "");
  if (composed.length > MAX_USERNAME) return undefined; // before what costs most
  return composed.normalize("NFD").replace(TOO_MANY, "").replace(DOT, "").normalize() || undefined;
}

const isText = (value: unknown): value is string => typeof value === "string";
const isToken = (value: unknown, pattern: RegExp): value is string => typeof value === "string" && pattern.test(value);
const isWhole = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;
function refusal(error: string, id?: string, wait?: number): Refusal {
  const soon = wait === undefined ? "" : `: try again in ${Math.ceil(wait / 100) / 10} s`;
  return { event: "error", error: error + soon, id, retry_after: wait };
}

// ──────────────────────────────────────────────────── Settings ────────────────────────────────────────────────────
/** What {@linkcode startChat} can be told. Everything has a default. */
export interface ChatOptions {
  /** The TCP port; 0 takes a free one. Default: 8000. */
  port?: number;
  /** The address to listen on; `0.0.0.0` is every network that the machine is on. Default: `127.0.0.1`. */
  hostname?: string;
  /** A path, `:memory:`, the URL of a remote database, or an open one. Default: `chat.db`; on Deno Deploy the app's own. */
  db?: string | Deno.Kv;
  /** The name of the room. Default: `Chat`. */
  title?: string;
  /** How many messages are kept; the oldest are deleted as new ones come. Default: 10000. */
  history?: number;
  /** Whether accepted messages are logged to the terminal. Default: true. */
  log?: boolean;
  /** The password that is required to join; the empty string lets everyone in. Default: everyone. */
  password?: string;
  /** Messages a second that a connection may send, five seconds' worth at once; 0 sets no limits. Default: 20. */
  rateLimit?: number;
  /** Connections at a time. Default: 10000. */
  maxClients?: number;
  /** Connections at a time from one address; 0 sets no limit. Default: 0. */
  maxClientsPerAddress?: number;
  /** Origins besides the server's own whose pages may connect, like `https://chat.example`. Default: none. */
  allowedOrigins?: string[];
  /** Whether to trust `X-Forwarded-For` and `X-Forwarded-Proto`: only behind a proxy. Default: false. */
  trustProxy?: boolean;
  /** Seconds after which a silent connection is closed, if it does not answer a ping either. Default: 30. */
  idleTimeout?: number;
  /** The path of a certificate, in PEM: with it, HTTPS and WSS are served. Default: HTTP and WS. */
  tlsCert?: string;
  /** The path of its key, in PEM. */
  tlsKey?: string;
}

type Settings = Required<Omit<ChatOptions, "db" | "tlsCert" | "tlsKey">> & ChatOptions;
const isUrl = (db: string) => /^https?:\/\//.test(db);
const TEXT = "a string", TITLE = "1 to 100 characters in one line", SWITCH = "on or off";
const ORIGINS = "origins with commas between them, like https://chat.example";
/** The variable of an option, its default, and what it must be: a number within a range, or one of the above. */
type Setting = [variable: string, fallback: unknown, rule: [number, number] | string];
const SETTINGS: Record<keyof ChatOptions, Setting> = {
  port: ["PORT", 8000, [0, 65_535]],
  hostname: ["HOST", "127.0.0.1", TEXT],
  db: ["CHAT_DB", undefined, TEXT],
  title: ["CHAT_TITLE", "Chat", TITLE],
  history: ["CHAT_HISTORY", 10_000, [1, 10_000_000]],
  log: ["CHAT_LOG", true, SWITCH],
  password: ["CHAT_PASSWORD", "", TEXT],
  rateLimit: ["CHAT_RATE_LIMIT", 20, [0, 1_000_000]],
  maxClients: ["CHAT_MAX_CLIENTS", 10_000, [1, 10_000_000]],
  maxClientsPerAddress: ["CHAT_MAX_CLIENTS_PER_ADDRESS", 0, [0, 10_000_000]],
  allowedOrigins: ["CHAT_ALLOWED_ORIGINS", [], ORIGINS],
  trustProxy: ["CHAT_TRUST_PROXY", false, SWITCH],
  idleTimeout: ["CHAT_IDLE_TIMEOUT", 30, [1, 86_400]],
  tlsCert: ["CHAT_TLS_CERT", undefined, TEXT],
  tlsKey: ["CHAT_TLS_KEY", undefined, TEXT],
};

/** Resolves settings from the options or, without any, from the environment. Throws a `RangeError` for an invalid one. */
function resolveSettings(options?: ChatOptions): Settings {
  const settings = Object.entries(SETTINGS).map(([option, [variable, fallback, rule]]) => {
    const given = options ? options[option as keyof ChatOptions] : Deno.env.get(variable) || undefined;
    if (given === undefined || given instanceof (Deno.Kv ?? Object)) return [option, given ?? fallback];
    const value = parse(given, rule);
    if (value !== undefined && (!options || typeof value === typeof given)) return [option, value];
    const sense = typeof rule === "string" ? rule : `a whole number from ${rule.join(" to ")}`;
    throw new RangeError(`${options ? option : variable} must be ${sense}, not ${JSON.stringify(given)}`);
  });
  const { db, tlsCert, tlsKey, ...rest } = Object.fromEntries(settings);
  if (!tlsCert !== !tlsKey) throw new RangeError("a certificate and its key go together");
  return { db: db ?? (Deno.env.has("DENO_DEPLOY") ? undefined : "chat.db"), tlsCert, tlsKey, ...rest };
}

function parse(given: unknown, rule: Setting[2]): unknown {
  const text = `${given}`;
  if (rule === SWITCH) return new Map([["on", true], ["true", true], ["off", false], ["false", false]]).get(text);
  if (rule === TEXT || rule === TITLE && /^[^\p{Cc}]{1,100}$/u.test(text)) return text;
  if (typeof rule !== "string") return /^\d+$/.test(text) && +text >= rule[0] && +text <= rule[1] ? +text : undefined;
  const origins = rule === ORIGINS ? text.split(",").filter(Boolean) : [""];
  return origins.every((origin) => URL.parse(origin)?.origin === origin) ? origins : undefined;
}

// ─────────────────────────────────────────── The terminal and the program ───────────────────────────────────────────
const ENCODER = new TextEncoder();
const turn = () => new Promise<void>((resolve) => setImmediate(resolve));
const wait = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
async function withTimeout(ms: number, promise: Promise<unknown> | undefined): Promise<void> {
  const late = Promise.withResolvers<void>(), timer = setTimeout(late.resolve, ms);
  await Promise.race([promise, late.promise]).finally(() => clearTimeout(timer));
}

const sha256 = async (text: string) => new Uint8Array(await crypto.subtle.digest("SHA-256", ENCODER.encode(text)));
const MAX_PRINTED = 16 * 1024; // UTF-16 units that wait to be printed
/** Standard output or standard error, written without waiting: what it does not take is dropped and counted. */
class Terminal {
  #waiting = "";
  #dropped = 0; // lines
  writing?: Promise<void>; // pending while there is anything to write: for ever, if nobody reads
  constructor(readonly stream: typeof Deno.stdout) {}

  print(line: string): void {
    if (this.#waiting.length + line.length > MAX_PRINTED) return void this.#dropped++;
    this.#waiting += `${line}\n`;
    this.writing ??= this.#write();
  }

  async #write(): Promise<void> {
    while (this.#waiting) {
      const text = this.#waiting, dropped = this.#dropped;
      const bytes = ENCODER.encode(dropped > 0 ? `${dropped} lines were dropped\n${text}` : text);
      this.#waiting = "";
      try {
        for (let at = 0; at < bytes.length;) at += await this.stream.write(bytes.subarray(at));
        this.#dropped -= dropped;
      } catch {
        this.#dropped += text.split("\n").length - 1;
      }
    }
    this.writing = undefined;
  }
}

const stdout = new Terminal(Deno.stdout), stderr = new Terminal(Deno.stderr);
const report = (error: unknown) => stderr.print(`Internal error: ${error instanceof Error ? error.stack : error}`);
function urls(addr: Deno.Addr, scheme: string): string[] {
  if (!("hostname" in addr)) return ["path" in addr ? `unix:${addr.path}` : JSON.stringify(addr)];
  const { hostname, port } = addr;
  const url = (address: string) => `${scheme}://${address.includes(":") ? `[${address}]` : address}:${port}/`;
  if (hostname !== "0.0.0.0" && hostname !== "::") return [url(hostname)];
  const { state } = Deno.permissions.querySync({ name: "sys", kind: "networkInterfaces" });
  const reachable = (state === "granted" ? Deno.networkInterfaces() : [])
    .filter(({ address, scopeid }) => !scopeid && (hostname === "::" || !address.includes(":")));
  return ["localhost", ...reachable.map(({ address }) => address)].map(url);
}

function printAddresses(addr: Deno.Addr, { db = "the app's KV database", title, password, tlsCert }: Settings): void {
  stdout.print(`${title} is open: ${urls(addr, tlsCert ? "https" : "http").join("  ")} (messages in ${db})`);
  const isLocal = !("hostname" in addr) || /^(127\.|::1$|localhost$)/.test(addr.hostname);
  if (!isLocal && !password) stdout.print("Everyone who reaches it may read and write, unless you set CHAT_PASSWORD.");
}

/** The start task with permission for the files that the settings name, and for the one that was denied. */
function commandFor({ db, tlsCert, tlsKey }: Settings, denied: string): string {
  const file = typeof db === "string" && db !== ":memory:" && !isUrl(db) ? db : denied;
  const read = new Set([file, tlsCert, tlsKey, denied].filter(Boolean));
  const write = [...read].filter((path) => path !== tlsCert && path !== tlsKey);
  return `FLAGS="--allow-read=${[...read]} --allow-write=${write}" deno task start`;
}

if (import.meta.main) {
  let settings: Settings | undefined, chat: Chat | undefined;
  const end = async () => {
    await chat?.shutdown();
    await withTimeout(GRACE, Promise.all([stdout.writing, stderr.writing]));
    Deno.exit();
  };
  addEventListener("unhandledrejection", (event) => (event.preventDefault(), report(event.reason))); // Deno's own too
  Deno.addSignalListener("SIGINT", end); // before anyone connects: it needs file descriptors
  if (Deno.build.os !== "windows") Deno.addSignalListener("SIGTERM", end);
  try {
    settings = resolveSettings();
    chat = await startChat(settings);
    Promise.try(printAddresses, chat.addr, settings).catch(report);
  } catch (error) {
    const { message } = error as Error, [, denied] = message.match(/^Requires (?:read|write) access to "(.*)"/) ?? [];
    const isTaken = error instanceof Deno.errors.AddrInUse, advice = settings && denied && commandFor(settings, denied);
    const reason = advice ? `${message.split(",")[0]}. Keep the settings, and run ${advice}` : message;
    stderr.print(`The chat cannot start: ${isTaken ? "the port is taken, set PORT to another" : reason}`);
    await withTimeout(GRACE, stderr.writing);
    Deno.exit(1);
  }
}
