/** The data structures of the page: its script names them in its comments. All times are in milliseconds. */

/** A message as everyone receives it. One that still waits to be sent has the number 0, and may have been refused. */
interface Message {
  seq: number;
  time: number;
  username: string;
  message: string;
  id?: string;
  tag?: string;
  refused?: string;
}

/** What the server sends. */
type Incoming =
  | { event: "joined"; seq: number; oldest: number; resumed?: boolean; username?: string; tag?: string }
  | { event: "receive_message" } & Message
  | { event: "history"; before: number; messages: Message[] }
  | { event: "presence"; online: number; users?: string[]; joined?: string[]; left?: string[] }
  | { event: "typing"; username: string }
  | { event: "error"; error: string; id?: string; retry_after?: number }
  | { event: "pong" };

/** What the page does with that. */
type Handlers = { [Kind in Incoming["event"]]?: (event: Extract<Incoming, { event: Kind }>) => void };

/** The elements of the page by their ids. */
interface Elements {
  name: HTMLInputElement;
  password: HTMLInputElement;
  message: HTMLTextAreaElement;
  notify: HTMLSelectElement;
  gate: HTMLDialogElement;
  rows: Rows;
  waiting: Rows;
  state: HTMLElement;
  wait: HTMLElement;
  retry: HTMLElement;
  count: HTMLElement;
  log: HTMLElement;
  top: HTMLElement;
  empty: HTMLElement;
  address: HTMLElement;
  share: HTMLElement;
  invite: HTMLElement;
  down: HTMLElement;
  strip: HTMLElement;
  who: HTMLElement;
  me: HTMLElement;
  self: HTMLElement;
  wrong: HTMLElement;
  company: HTMLElement;
  counter: HTMLElement;
  composer: HTMLElement;
  matches: HTMLElement;
  send: HTMLElement;
  news: HTMLElement;
  people: HTMLElement;
  here: HTMLElement;
  names: HTMLElement;
  more: HTMLElement;
  able: HTMLElement;
  enter: HTMLElement;
  denied: HTMLElement;
}

/** What has rows in it. */
type Rows = Omit<HTMLElement, "children"> & { children: HTMLCollectionOf<Row> };

/** A message in the log. How it is dressed depends on the message above it, and on what `stamp` counts. */
interface Row extends HTMLElement {
  message: Message;
  above?: Message;
  stamp?: number;
  /** Who uses its name, with a colour for each tag, and whether several were known when it was dressed. */
  tags: Map<string, number>;
  several?: boolean;
}

/** This person. */
interface Me {
  /** The name as this person wants it. */
  name: string;
  /** The name as the room has it. */
  known: string;
  /** A secret, kept in this browser. */
  key: string;
  /** What the server derives from it, and puts on every message. */
  tag?: string;
}

/** The connection. */
interface Link {
  socket?: WebSocket;
  joined: boolean;
  /** The name in a join that is not answered yet. */
  asking?: string;
  /** Whether nothing is tried until a password is entered. */
  locked: boolean;
  /** Kept as it is, in this tab alone: every join has to have it as it is. */
  password?: string;
  /** When the connection was begun, or joined. */
  since: number;
  /** When it said something last. */
  heard: number;
  /** When the answer to a ping is overdue; 0 if none is awaited. */
  deadline: number;
  /** How many tries failed in a row. */
  tries: number;
  /** When the next try is due; 0 if none is. */
  next: number;
  timer: number;
  /** Whether the server is well, and takes no more connections. */
  full: boolean;
}

/** What this person wrote and the server has not confirmed. */
interface Outbox {
  entries: Message[];
  /** The id of the one that is under way. */
  sending: string;
  /** When that was sent. */
  since: number;
  /** Whether it took so long that the server was asked. */
  doubted: boolean;
  /** The server wants nothing before this. */
  /** Ids that were confirmed: what is this person's own where a server knows no tags. */
  sent: Set<string>;
}

/**
 * The messages. Places are numbers of messages:
 *
 *     oldest   mark    history  passed  caughtUp  newest
 *       ├────── the room keeps these ───────────────┤
 *         ├─ page ─┤                     ├── tail ──┤
 *              ├── rows: what is looked at ──┤
 */
interface Log {
  /** The newest. */
  tail: Message[];
  /** The page of the history that came last. */
  page: Message[];
  /** The oldest that the room keeps. */
  oldest: number;
  /** The last that this person saw. */
  seen: number;
  /** The last before the line "New messages"; 0 is nowhere. */
  mark: number;
  /** The newest when the page was opened: what came before is not news. */
  history: number;
  /** The newest when this person left the end: what came since is counted. */
  passed: number;
  /** The newest at the last join: what came before was missed. */
  caughtUp: number;
  /** The `before` of a history that has not come yet. */
  asked: number;
  /** Whether what is new comes into view. */
  following: boolean;
  /** Where the log was scrolled to when that was last looked at. */
  scrolled: number;
  /** Rows with another stamp have to be dressed again. */
  stamp: number;
  /** What today is. */
  day: string;
  /** The frame that is asked for. */
  frame: number;
  /** How many more UTF-16 units of messages may be drawn in this frame. */
  budget: number;
}

/** Who is here. */
interface People {
  /** Connections that joined. */
  online: number;
  /** The names that are here. */
  users: Set<string>;
  /** Whether the list has to be drawn again. */
  stale: boolean;
  /** Who uses a name, or one that looks like it: a colour for each tag. */
  known: Map<string, Map<string, number>>;
  /** Until when each is said to type. */
  typing: Map<string, number>;
  /** Who came or left, and until when that is shown. */
  notice: (Node | string)[];
  until: number;
}

/** What comes while the page is not looked at. */
interface News {
  away: boolean;
  unread: number;
  /** What is to be read out. */
  unspoken: Message[];
  /** The timer that tells of all this. */
  later: number;
}

/** What is typed. */
interface Composer {
  /** When others were last told that this person types. */
  typed: number;
  /** Whether a message waits for a name. */
  wanted: boolean;
  /** The names that an @ may become. */
  matches: string[];
  /** Which of them Enter takes. */
  choice: number;
}
